"""The commands: values in, results out, exit codes."""
