"""The decode loop of `model.generate` on a qoqc cache: a step is a CUDA graph, not Python."""
