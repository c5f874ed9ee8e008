"""The operator kv_write."""
