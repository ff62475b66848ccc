"""A chat model at work: loading it, running it in batches, and hooks on its residual stream."""
