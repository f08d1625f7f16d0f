"""Tasks on adapter files."""
