"""Datasets: many samples in shards, with a schema and a digest of all values."""
