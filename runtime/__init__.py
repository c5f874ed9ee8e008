"""Serves engines: the C++ core (csrc/), the Python API, the HTTP server and the commands."""
