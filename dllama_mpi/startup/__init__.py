"""Once, before the first token: options, opening a model, who holds what, memory, speed, threads."""
