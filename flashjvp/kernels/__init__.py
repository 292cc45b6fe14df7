"""The Triton and Gluon kernels, and what launches them. MATH.md has their equations."""
