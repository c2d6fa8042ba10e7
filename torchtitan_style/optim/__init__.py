"""From gradients to new weights: clipping, AdamW, learning-rate schedule."""
