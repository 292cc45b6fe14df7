"""From the API to a backend: the operators of PyTorch's dispatcher, their derivatives, and ways around it."""
