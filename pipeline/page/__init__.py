"""Pieces of the report's page: markup, curves made of histories, drawings, style. Pure functions."""
