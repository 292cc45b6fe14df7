"""Samples of a trained network, and pictures of them."""
