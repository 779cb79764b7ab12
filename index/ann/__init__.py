"""FAISS and nothing else: index types, their parameters, searching, GPU copies."""
