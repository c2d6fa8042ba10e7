"""How good a model is: loss on text, tasks of the lm-evaluation-harness."""
