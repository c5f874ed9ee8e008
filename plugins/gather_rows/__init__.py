"""The operator gather_rows."""
