"""`vlm inspect`: one scan of a dataset, its statistics and its contact sheet."""
