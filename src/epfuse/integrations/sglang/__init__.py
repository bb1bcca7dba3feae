"""epfuse in SGLang: a plugin that runs the experts of layers that the policy takes, and lets MXFP8 start on Hopper.

SGLang calls `plugin.register` in each of its processes. What it finds there is all that changes SGLang:

    plugin.py     registers a MoE runner and hooks, or stands down with one warning
    facts.py      what SGLang is about to build for a layer, and what of it epfuse refuses
    experts.py    the quantisation method of a layer that epfuse runs: its weights, its calls, new weights under way
    dense.py      MXFP8 linears, for which SGLang has no kernel on Hopper, in BF16
"""
