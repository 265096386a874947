"""What holds for the whole: layers, costs, docs, launch files."""
