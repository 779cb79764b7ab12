"""Image-text pairs to shards, shards to an encoder, its embeddings to an index that answers questions."""

__version__ = "0.1.0"
