"""A CPU emulator of a Hopper multiprocessor, for kernels written in Gluon."""
