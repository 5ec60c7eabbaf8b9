"""Two releases beside each other on the same inputs."""
