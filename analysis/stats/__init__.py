"""From matched pairs to the verdict: effects, confidence intervals and p-values."""
