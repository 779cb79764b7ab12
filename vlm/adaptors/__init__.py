"""Our models in the shapes that other libraries expect: mteb, sentence-transformers, transformers, open_clip."""
