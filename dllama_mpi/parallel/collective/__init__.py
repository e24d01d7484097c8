"""The all-reduce of activations: terms of every rank in, the same sum on every rank out.

table        the algorithms: names, costs, where each can be used
algorithms   their compiled code, over `messages` (MPI from compiled code), `payload` (what is sent) and `intrinsics`
exchange     what the compiled layers call: start, compute, finish
link         the record that tells compiled code whom and what it works with; `calls` are the addresses in it
memory       the buffers and their sizes; `shared`, memory that the ranks of a host have in common
fallback     the same through mpi4py
transport    all of that together, for one communicator
choose       which algorithm for which size; `overlap`, exchanges while the main thread computes
all_reduce   what the group uses
"""
