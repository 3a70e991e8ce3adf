"""What a conversion is made of: expressions, plans, and how matrices are cut."""
