"""Project-wide contracts: layers, costs, docs, launch files."""
