"""A release made again from what it records, and held against it."""
