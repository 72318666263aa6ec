"""Checks that per-sample gradients are exact, and that no record changes the gradient of another."""
