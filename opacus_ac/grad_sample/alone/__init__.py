"""Checks that the gradient of a record in a batch is the same as for the record alone."""
