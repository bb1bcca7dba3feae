"""Measured tiles: their tables, how a call finds a row in them, and the search that measures them."""
