"""Impressions as batches: the table of a split, the embedding lookup, and generated impressions."""
