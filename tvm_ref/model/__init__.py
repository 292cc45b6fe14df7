"""The diffusion transformer, its layers on pairs of value and tangent, and its moving averages."""
