"""A release that is there: find it, believe it, open it, serve it."""
