"""Tokenizers and encoders: small ones that are trained from scratch, and pretrained ones."""
