"""True numbers about a model: ranks, retrieval, zero-shot, captions; knows nothing of training or FAISS."""
