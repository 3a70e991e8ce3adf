"""The conversion pipeline, from a model to a file."""
