"""The synthetic shapes dataset: drawn scenes with captions in four languages."""
