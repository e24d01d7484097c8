"""From requests to tokens: the facade, the root's engine, the scheduler, the sampler and the workers' loop."""
