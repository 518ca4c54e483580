"""Checkpoints others quantized to 4 bit, as packed weights, and packed weights as QServe's."""
