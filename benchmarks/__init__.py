"""Measurements anyone can repeat; run them as modules from the root of the repository (see README.md)."""
