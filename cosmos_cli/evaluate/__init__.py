"""Score models before and after post-training, and check the released weights at first contact."""
