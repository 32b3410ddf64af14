"""Process groups, and what Megatron-Core wants to find of them."""
