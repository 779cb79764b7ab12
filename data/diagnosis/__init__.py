"""What holds a run back: each stage from the disk to the batch measured alone, and which is the slowest."""
