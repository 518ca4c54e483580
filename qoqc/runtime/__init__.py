"""What lives beside a running model: packed weights, caches, devices, private-API adapters."""
