"""The benchmark: roofs of the device, then every path and every peer, first checked and then timed."""
