"""From a configuration to a trainer: data and starting points are checked first, then models are built."""
