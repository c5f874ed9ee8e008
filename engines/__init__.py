"""The treaty between compiler and runtime: what an engine is (FORMAT.md)."""
