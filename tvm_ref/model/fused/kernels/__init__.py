"""Triton kernels. Importing one needs Triton, so that is left to the operators, when they run."""
