"""From a recipe to a plan: which scheme, which ranks."""
