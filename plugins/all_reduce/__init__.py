"""The operator all_reduce."""
