"""Tied models at run time: parameters that are computed from what is stored."""
