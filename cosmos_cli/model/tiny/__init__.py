"""The embedded model: the world that it renders, its scorer and its weights."""
