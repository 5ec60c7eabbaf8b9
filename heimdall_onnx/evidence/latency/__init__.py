"""How fast both models are, each in a process of its own, with intervals."""
