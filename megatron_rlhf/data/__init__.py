"""From the user's files to token sequences: demonstrations, comparisons, prompts and pretraining text.

Everything here is the same on every rank; `batches.shard` picks a data-parallel rank's part. Nothing is padded or made
into tensors of a batch: that is the trainers' business, which know their microbatches.
"""
