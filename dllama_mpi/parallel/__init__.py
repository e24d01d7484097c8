"""Ranks and what they say to each other. This package alone imports mpi4py."""
