"""`python -m verify model` and `published`: whole networks and their training losses."""
