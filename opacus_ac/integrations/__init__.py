"""Optional integrations; each is imported only where it is used."""
