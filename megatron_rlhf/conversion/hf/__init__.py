"""Hugging Face folders: configuration, weights, and the other files in them."""
