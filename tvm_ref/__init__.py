"""The reference trainer for Terminal Velocity Matching, built on flashjvp.

Commands, run as `python -m tvm_ref.NAME`: train, sample, evaluate, encode (images to VAE latents), convert (published
weights), ema (averaged weights of any length). Packages: data (data sets), model (the network), objective (losses),
training (the training loop and checkpoints), sampling (the sampler) and quality (FID and other metrics). The module
unfinished keeps the finished parts of long work.
"""

from flashjvp_commands.extras import needed_by_commands

needed_by_commands("tvm_ref", "train")
