"""An interpreter of gfx942 assembly: what Triton compiled, executed under a model of the instruction set."""
