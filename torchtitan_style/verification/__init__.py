"""Showing that the numbers are right: against Transformers, and of any layout against one process."""
