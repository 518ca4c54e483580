"""qoqc ops to Triton source to tuned launchers."""
