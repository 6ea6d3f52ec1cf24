"""Fetch and verify the model weights and the dataset of a recipe.

assets.py says which files a recipe needs and fetch.py gets them. t5.py takes the text encoder out
of the file that Google published.
"""
