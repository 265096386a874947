"""The search phase: Ray Tune, Optuna and ASHA, one bracket per arm."""
