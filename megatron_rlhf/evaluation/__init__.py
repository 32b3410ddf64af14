"""Evaluation of a policy: its responses, their scores, the loss on held-out text, and their statistics."""
