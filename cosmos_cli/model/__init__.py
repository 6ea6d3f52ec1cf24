"""The model and everything that touches tensors."""
