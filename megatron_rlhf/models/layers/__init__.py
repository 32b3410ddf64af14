"""What a layer of a GPT is made of: linear layers, attention, a cache to decode from, and what each pass computes of it."""
