"""Serving validation: a matrix of points, each measured once on a node, and nothing lost; imports no kernel."""
