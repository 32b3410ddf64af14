"""Public benchmarks, by lm-evaluation-harness, on models in their layouts; no export."""
