"""Real servers and clusters in separate processes."""
