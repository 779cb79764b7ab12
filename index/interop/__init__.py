"""Embeddings and indexes of other tools, read and written."""
