"""Where run directories are kept: a folder, or an object store with a working copy here."""
