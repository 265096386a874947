"""The same trials by this project and by others; `python -m tests.benchmarks.peers`."""
