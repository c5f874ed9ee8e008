"""The operator linear."""
