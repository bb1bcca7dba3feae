"""Families of kernels: which calls each runs, in which tiles and which steps (`registry` has them all)."""
