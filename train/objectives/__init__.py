"""Training objectives: loss terms, and the expression that sums them."""
