"""How large an error may be: budgets derived from rounding."""
