"""Dual encoders and captioners on open_clip's towers; knows nothing of training or FAISS."""
