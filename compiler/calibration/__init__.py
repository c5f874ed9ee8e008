"""Calibration: what a text shows of the inputs of every product, as a file that builds read."""
