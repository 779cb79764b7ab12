"""Embeddings on disk, FAISS over them, and the catalogue that says which picture a row is."""
