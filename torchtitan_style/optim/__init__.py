"""From gradients to new weights: clipping, which steps are taken, AdamW, Muon, learning-rate schedules."""
