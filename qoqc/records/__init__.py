"""Records of compiled calls: what a later process needs to run them without tracing the model."""
