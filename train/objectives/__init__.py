"""What can be minimised: terms, and the expression that adds them up."""
