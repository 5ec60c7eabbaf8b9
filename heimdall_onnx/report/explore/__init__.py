"""A figure that answers which sample is behind an error, and a widget that asks on."""
