"""Numerics in plain torch: the definition every kernel is tested against."""
