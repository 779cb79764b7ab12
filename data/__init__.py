"""Samples, shards and the streaming loader; knows nothing of models, training or FAISS."""
