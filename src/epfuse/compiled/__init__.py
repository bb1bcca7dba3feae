"""The kernels of a layer, compiled before they are needed."""
