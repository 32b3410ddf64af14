"""Checkpoints of ours, which any layout can load, and Hugging Face folders, read and written."""
