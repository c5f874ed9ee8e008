"""The operator rotary_table."""
