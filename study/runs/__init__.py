"""One run in a worker process: what it does, how it fails, and what it may use of a GPU."""
