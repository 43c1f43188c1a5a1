"""What a domain version is, where versions live, and how conversations become tokens."""
