"""A compiled model as a directory: `save` writes one, `load` builds a model from it alone."""
