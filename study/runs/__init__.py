"""Runs in worker processes: training, failures and retries, GPU sharing."""
