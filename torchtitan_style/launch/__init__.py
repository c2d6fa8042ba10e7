"""Everything before the first rank: checks, the run lock, waiting for hosts, starting the ranks."""
