"""Checkpoints: whole and verified, or not there."""
