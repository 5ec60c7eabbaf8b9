"""What is measured of an exported model, and the gates that judge it."""
