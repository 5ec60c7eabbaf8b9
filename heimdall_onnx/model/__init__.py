"""What is released: its signature, its checkpoint, example inputs, running it."""
