"""Video files: writing and reading."""
