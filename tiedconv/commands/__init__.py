"""One module for each verb of the command line and of the package."""
