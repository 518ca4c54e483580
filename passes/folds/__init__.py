"""Exact changes of weights: the model computes the same, the quantized model computes it better."""
