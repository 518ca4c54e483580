"""Serving: transformers' continuous batching over pages of 4- and 8-bit keys and values."""
