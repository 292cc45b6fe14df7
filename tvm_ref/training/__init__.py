"""The training loop.

config (settings of a run), presets (complete configurations), trainer (the loop, with resuming and signals), batches
(micro-batches of a step), step (loss and gradient), state (networks and optimizer), checkpoint, parallel (DDP, FSDP,
activation checkpointing, compilation), logger (metrics.csv, TensorBoard, progress), report (sample grids and the final
evaluation), inductor (a workaround for a compiler bug).
"""
