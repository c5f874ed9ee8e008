"""The operator all_gather."""
