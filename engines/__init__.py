"""Reward engines. Each file needs rewards.py and its own packages alone, so it may be copied by itself."""
