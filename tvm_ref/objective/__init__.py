"""The training objective.

loss (which objective; Terminal Velocity Matching, flow matching and MeanFlow), improved_meanflow, consistency, shortcut
(the others), parts (what they are written with), path (interpolation between data and noise), time_sampling (how the
times of a training step are drawn).
"""
