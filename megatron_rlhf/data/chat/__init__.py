"""Conversations: lists of messages to tokens through the tokenizer's own chat template, and which of them are learned."""
