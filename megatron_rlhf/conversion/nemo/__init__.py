"""NeMo archives."""
