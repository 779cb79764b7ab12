"""Questions to an index answered with pictures, without HTTP; knows nothing of training."""
