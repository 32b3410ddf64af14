"""Records of other shapes than ours: templates for columns, and known shapes, each described by a small YAML file."""
