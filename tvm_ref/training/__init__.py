"""The training loop.

- settings: config, presets (complete configurations), yaml_config (files of settings)
- the loop: trainer (with signals), resuming (where it starts), preflight, run_lock
- a step: batches (micro-batches), step (loss and gradient), state (networks and optimizer), schedule (learning rate),
  observe (norms, loss by time), parallel (DDP, FSDP, activation checkpointing, compilation), inductor (a workaround for
  a compiler bug)
- what is saved: checkpoint, checkpoint_folder, saver (when and by which thread), snapshots (for post-hoc EMA),
  converted (networks from checkpoints, runs and converted weights), files
- what is logged: outputs (all logs), logger (CSV, TensorBoard, progress), weights_and_biases, tracing (profiler),
  report (sample grids and the final evaluation), evaluations (while it trains)
"""
