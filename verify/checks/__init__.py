"""Checks beyond single results: transforms, masks, threads, and the emulated kernels."""
