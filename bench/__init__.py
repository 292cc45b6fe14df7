"""Benchmarks: `python -m bench.sweep` measures attention with a JVP, provider beside provider."""
