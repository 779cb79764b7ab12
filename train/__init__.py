"""Pretraining: objectives, optimiser, state, the loop; knows nothing of FAISS or HTTP."""
