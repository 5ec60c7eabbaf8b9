"""What every room stands on: errors, parameters, gates, text, files, processes, the machine."""
