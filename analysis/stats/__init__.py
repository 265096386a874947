"""From matched pairs to a verdict: effects, intervals and p-values."""
