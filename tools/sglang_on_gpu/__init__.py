"""Our experts in SGLang's own layer on a GPU, beside its Triton runner: captured, replayed, checked, timed.

    python3 -m tools.sglang_on_gpu --json record.json

| file | what it does |
| --- | --- |
| `stand_ins.py` | lets SGLang be imported without its wheel of compiled kernels |
| `layers.py` | `FusedMoE` as one expert parallel rank of MiniMax-M3 has it, with a runner |
| `__main__.py` | the command: options, the time budget, record and table |

It needs the Python files of a tested SGLang and the packages that these import, torch and triton for the GPU, nvcc for
one kernel of SGLang's, and epfuse with its dependencies. SGLang's server and models are not used.
"""
