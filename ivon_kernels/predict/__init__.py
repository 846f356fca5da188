"""Predictions averaged over samples of the weights, and how good they are."""
