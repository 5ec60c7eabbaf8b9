"""How good answers are in their task, and whether they are shown to be no worse than others'."""
