"""Compiled kernels. This package alone imports Numba; it knows arrays and addresses, nothing of models or MPI."""
