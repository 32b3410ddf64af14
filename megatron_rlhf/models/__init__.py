"""Megatron-Core's GPT in the four roles of RLHF: policy, reference, reward and value model."""
