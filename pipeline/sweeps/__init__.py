"""Sweeps: what a launcher and its workers say to each other."""
