"""Whether a record's gradient is what it would be if the record were alone."""
