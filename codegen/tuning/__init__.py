"""Which form and tile a kernel gets: from a table, from a search on the device, by heuristic."""
