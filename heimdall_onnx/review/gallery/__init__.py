"""All releases of a folder on one page."""
