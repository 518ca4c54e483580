"""Graph rewrites: fx graph in, fx graph with qoqc ops out. Knows no kernels, runs on any device."""
