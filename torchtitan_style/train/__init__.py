"""Training: the loop, one optimizer step, and how a run resumes and stops. Start reading in ``trainer.py``."""
