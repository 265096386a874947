"""The same trials by this project and by other tools: `python -m tests.benchmarks.peers`."""
