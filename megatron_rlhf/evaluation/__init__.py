"""What a policy is worth: its responses, their scores, the loss on held-out text, and the statistics of all that."""
