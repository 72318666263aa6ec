"""Per-sample norms and weighted sums from one backward pass: mode "bk"."""
