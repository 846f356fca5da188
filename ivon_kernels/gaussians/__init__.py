"""Gaussians over named weight tensors, and their samples in a model."""
