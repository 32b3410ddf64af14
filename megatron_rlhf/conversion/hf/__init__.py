"""Hugging Face folders: configuration, weights, and the files beside them."""
