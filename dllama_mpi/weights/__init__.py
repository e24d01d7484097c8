"""A model's tensors: where they lie, how they are cut and quantised, how they are written."""
