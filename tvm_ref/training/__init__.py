"""The training loop.

config (settings of a run), presets (complete configurations), trainer (the loop, with resuming and signals), batches
(micro-batches of a step), step (loss and gradient), state (networks and optimizer), schedule (learning rate),
checkpoint, converted (networks from checkpoints, runs and converted weights), parallel (DDP, FSDP, activation
checkpointing, compilation), logger (metrics.csv, TensorBoard, progress), report (sample grids and the final
evaluation), inductor (a workaround for a compiler bug).
"""
