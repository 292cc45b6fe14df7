"""`python -m verify`: every check on every case, backend and type."""
