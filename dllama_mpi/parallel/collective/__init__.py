"""The all-reduce of activations: algorithms in compiled code, their link to MPI, payloads, and the choice."""
