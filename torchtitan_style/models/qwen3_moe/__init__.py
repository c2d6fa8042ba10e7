"""Qwen3-MoE: Qwen3 whose feed-forward layers are mixtures of experts."""
