"""`python -m verify codegen`: what the kernels compile to, without a GPU."""
