"""One training run: data, step, optimizer, loop, evaluation and checkpoints; no Ray."""
