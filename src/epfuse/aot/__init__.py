"""Compile for a GPU that is not there: resources, gates, and a time model."""
