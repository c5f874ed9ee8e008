"""Compiling the plugins' GPU kernels to machine code, on any machine: no GPU, no driver, no torch."""
