"""The operator rms_norm."""
