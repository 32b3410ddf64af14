"""The mathematics of RLHF: functions on tensors and floats, one concept a file. They know no models and no ranks."""
