"""Numerical building blocks: linear algebra, Fisher-weighted errors, least squares, symmetries."""
