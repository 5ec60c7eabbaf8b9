"""What a person reads: the notebook's run, its tables and figures, the page made of it."""
