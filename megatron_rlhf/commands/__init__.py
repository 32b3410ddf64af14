"""Command lines that are not a stage's: what `tools/` starts."""
