"""The operator sample."""
