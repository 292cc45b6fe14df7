"""`python -m verify faults`: mutation tests, which plant bugs and show that the checks catch them."""
