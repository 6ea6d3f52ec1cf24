"""Scores before and after post-training, and the first contact with released weights."""
