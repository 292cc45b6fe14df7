"""Checks beyond a single result: PyTorch's transforms, masks, threads, repeated calls, and emulated GPU kernels."""
