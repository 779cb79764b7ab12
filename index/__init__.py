"""Embeddings on disk, FAISS indexes over them, and the catalogue that says what each row is."""
