"""Ranks and what they share: process group, mesh, sharding, recomputation, compilation, loss.

Nothing here knows a particular model; ``models/*/parallelize.py`` puts these parts together.
"""
