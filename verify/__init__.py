"""Proof that flashjvp's results are right: cases, float64 oracles, and the one place of error budgets."""
