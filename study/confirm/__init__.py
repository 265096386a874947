"""The confirmation phase: champions' recipes retrained in matched pairs."""
