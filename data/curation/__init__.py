"""Curation: facts of samples, rules over them, and the selection that comes out."""
