"""Tabular data shared by tasks: schema, encoding, shuffling, memory-mapped streams and digests."""
