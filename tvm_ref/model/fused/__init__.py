"""Triton kernels of a training step that inductor divides into several, each with its backward pass.

stream.py and heads.py hold what the blocks call: they take a kernel where it applies (applies.py), and else the
formulas of `dual`. The *_operators.py make operators of the kernels, which are in kernels/.
"""
