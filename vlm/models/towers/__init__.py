"""Towers: image and text encoders by name, pooling, projection."""
