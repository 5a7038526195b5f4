"""Tokenizers and encoders: small ones trained here, and pretrained ones."""
