"""Make a release: run the notebook, judge it, publish it, offer it, or take all back."""
