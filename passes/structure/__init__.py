"""What a decoder is made of, read off its captured graph: residual stream, attentions, MLPs."""
