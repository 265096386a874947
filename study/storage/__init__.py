"""Storage of run directories: a folder, or an object store with a local working copy."""
