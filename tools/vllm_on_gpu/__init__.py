"""Our experts inside vLLM's modular kernel on a GPU, beside vLLM's own: checked, then timed.

    python3 -m tools.vllm_on_gpu --json record.json

| file | what it does |
| --- | --- |
| `kernels.py` | experts behind vLLM's `FusedMoEKernel`: ours, Marlin, the MXFP8 emulation, Triton; with biases BF16's |
| `checks.py` | eager, captured and replayed with other routings, in poisoned workspaces, against a float64 oracle |
| `__main__.py` | the command: options, the time budget, record and tables |

It needs vLLM 0.25.1 with its compiled operators, torch and triton for the GPU, and epfuse with its dependencies
(click, pydantic, rich). vLLM's configuration, server and models are not used.
"""
