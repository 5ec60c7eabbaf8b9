"""Evaluation data: read, checked, written."""
