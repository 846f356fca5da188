"""What the optimizer is made of."""
