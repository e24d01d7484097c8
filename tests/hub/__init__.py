"""Downloading by name, from a hub of the tests' own."""
