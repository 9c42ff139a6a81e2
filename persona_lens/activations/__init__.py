"""Means and projections of the residual stream, read in hooks during the forward pass."""
