"""The state of a run on disk: written whole, in the background, kept, copied, read back."""
