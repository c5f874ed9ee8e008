"""The operator embedding."""
