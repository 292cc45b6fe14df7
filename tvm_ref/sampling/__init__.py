"""Sampling from a trained network.

sampler (the few-step sampler, and the cycle error), generate (many samples in batches, and the guidance scale), grids
(samples as one PNG file), image_files (samples as a data set of images).
"""
