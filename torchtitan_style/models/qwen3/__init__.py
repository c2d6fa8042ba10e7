"""Qwen3: configuration, model, how it is parallelized."""
