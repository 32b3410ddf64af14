"""From the user's files to token sequences: demonstrations, comparisons, prompts and pretraining text.

Everything here is the same on every rank; `batches.shard` picks a data-parallel rank's part. Nothing is padded or made
into batch tensors here: the trainers do that, as they know their microbatches.
"""
