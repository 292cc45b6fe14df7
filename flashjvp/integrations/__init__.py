"""flashjvp inside models that nobody rewrites: one file for each thing that is replaced, and what puts it in place."""
