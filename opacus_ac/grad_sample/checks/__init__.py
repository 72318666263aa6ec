"""Checks that per-sample gradients are exact and that records do not couple."""
