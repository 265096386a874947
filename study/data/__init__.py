"""Images: sources, decoding and splits."""
