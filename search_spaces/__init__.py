"""What may vary in a study: hyperparameters, arms and spaces, as data."""
