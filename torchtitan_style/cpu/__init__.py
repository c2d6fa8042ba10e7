"""What makes training on CPUs fast. A reader who cares about GPUs only can skip this folder."""
