"""What tasks share of tabular data: schema, encoding, shuffling, mapped streams and digests."""
