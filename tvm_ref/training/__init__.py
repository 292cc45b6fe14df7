"""A training run: settings, steps, processes, checkpoints, figures."""
