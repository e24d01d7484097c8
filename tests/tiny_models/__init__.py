"""Tiny random models of every supported architecture, written as Hugging Face directories.

Each case is a complete ``config.json`` in the manner of a well-known published model, scaled down to a few hundred
kilobytes, with random weights. The weights come from ``numpy.random.RandomState``, whose stream is frozen, so the
models need not be stored: only what transformers computes for them is (see ``make_reference.py``).

Only numpy is used here. The safetensors files are written directly, as numpy has no bfloat16.
"""
