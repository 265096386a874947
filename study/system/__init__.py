"""The machine and the command line: cache, downloads, signals, progress."""
