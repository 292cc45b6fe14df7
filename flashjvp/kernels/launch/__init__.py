"""What launches need: a call's geometry, tiles, compiled kernels, and replay of earlier calls."""
