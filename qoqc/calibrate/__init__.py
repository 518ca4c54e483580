"""The offline half of QoQ: weights, scales and KV bits are chosen here, and the result judged."""
