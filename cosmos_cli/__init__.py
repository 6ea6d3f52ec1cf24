"""Post-train Cosmos-Predict1 Text2World on your own videos and generate videos with the result."""

__version__ = "0.1.0"
