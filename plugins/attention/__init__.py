"""The operator attention."""
