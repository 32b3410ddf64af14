"""The mathematics of RLHF: functions on tensors and floats, one concept per file. They know nothing of models or ranks."""
