"""Checkpoints: their files, when they are written and read, and their copies elsewhere."""
