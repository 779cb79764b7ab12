"""Queries to an index, ranked and shown as pages, without HTTP; knows nothing of training."""
