"""Images: where they come from, how they are read, and which serve for what."""
