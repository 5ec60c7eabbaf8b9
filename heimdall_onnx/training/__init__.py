"""Train a model, then release it."""
