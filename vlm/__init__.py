"""Image-text pairs to shards, shards to an encoder, its embeddings to an index that answers queries."""

DISTRIBUTION = "vlm-pipeline"
__version__ = "0.1.0"
