"""Seconds: exchanges, layers, schedules, checkpoints. Counts of FLOPs and bytes over the rates of a cluster."""
