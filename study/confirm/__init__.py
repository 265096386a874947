"""The confirmation phase: the winners trained again, in matched pairs."""
