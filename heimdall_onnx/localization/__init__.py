"""The reference problem: its network, recordings, features and simulation."""
