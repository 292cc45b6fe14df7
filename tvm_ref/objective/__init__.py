"""The training losses, the path between data and noise, and how times are drawn."""
