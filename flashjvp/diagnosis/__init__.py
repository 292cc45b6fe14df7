"""`flashjvp.check`: whether a model is right, and fast, under a JVP and a backward pass through it."""
