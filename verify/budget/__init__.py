"""How large an error may be: budgets derived from rounding. The rule is in tolerance.py."""
