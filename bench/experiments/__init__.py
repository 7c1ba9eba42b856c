"""The Transformer beside recurrent networks, at equal budgets."""
