"""Benchmarks: `python -m bench.sweep` measures attention with a JVP, provider beside provider."""

from flashjvp_commands.extras import needed_by_commands

needed_by_commands("bench", "train", "eval")
