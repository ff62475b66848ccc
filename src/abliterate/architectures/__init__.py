"""Which tensors and modules write to the residual stream, as data: one row an architecture."""
