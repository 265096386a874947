"""What is read from a run directory: frames, tables, figures and the report."""
