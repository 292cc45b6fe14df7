"""Triton kernels of a training step that inductor divides into several, each with its backward pass.

stream.py and heads.py hold what the blocks call: they take a kernel where it applies (applies.py), and else the
formulas of `dual`. *_operators.py are the operators of the dispatcher, so that torch.compile keeps them whole, and
*_kernels.py what they run.
"""
