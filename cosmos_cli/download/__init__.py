"""Fetch and verify the model weights and the dataset of a recipe.

assets.py says which files a recipe needs and fetch.py gets them. hub.py waits for a busy hub and
explains its errors. t5.py takes the text encoder out of the file that Google published.
"""
