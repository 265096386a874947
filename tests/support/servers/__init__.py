"""Real servers and clusters in processes of their own."""
