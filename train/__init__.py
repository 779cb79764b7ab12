"""Pretraining: objectives, optimizer, state, the loop; knows nothing of FAISS or HTTP."""
