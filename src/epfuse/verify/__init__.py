"""The correctness suite: every path of a device against a float64 oracle, over all ranks and awkward routings."""
