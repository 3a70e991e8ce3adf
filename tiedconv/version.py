"""The version of this package, in one place for code; `pyproject.toml` says the same."""

__version__ = "0.2.0"
