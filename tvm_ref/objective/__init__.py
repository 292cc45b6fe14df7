"""The training objective.

loss (Terminal Velocity Matching, flow matching and MeanFlow), path (interpolation between data and noise),
time_sampling (how the times of a training step are drawn).
"""
