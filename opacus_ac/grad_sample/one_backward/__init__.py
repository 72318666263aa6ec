"""Mode "bk": norms of per-sample gradients and their weighted sum from one backward pass."""
