"""Data sets, archives and latents."""
