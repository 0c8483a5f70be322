"""Plumbing: flags, data, workers, metrics, checkpoints. Can be believed without being read; imports nothing from outside."""
