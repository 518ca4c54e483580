"""One model on several GPUs: each rank holds a part of the weights and of the KV heads."""
