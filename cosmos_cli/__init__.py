"""Post-train Cosmos-Predict1-7B on your own videos and generate videos with the result."""

__version__ = "0.1.0"
