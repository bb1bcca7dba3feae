"""vLLM's server with epfuse and without it on one GPU: from the first request on, in answers, over a long run.

    python3 -m tools.serve_on_gpu serve --out FOLDER --servers none,epfuse,epfuse,none --seconds 560
    python3 -m tools.serve_on_gpu merge FOLDER --json record.json

| file | what it does |
| --- | --- |
| `models.py` | folders that ``vllm serve`` takes: MiniMax-M3 of true width, Qwen3-30B-A3B, without weights |
| `checkpoint.py` | a small MiniMax-M3 with weights from a seed, for vLLM and for transformers |
| `plugin.py`, `m3.py` | plugins in vLLM's processes: count what Triton compiles; MiniMax-M3 without flashinfer |
| `arms.py` | a server's command, environment and caches, with epfuse or without |
| `bench.py` | ``vllm bench serve`` as a process that is started once |
| `servers.py` | part ``serve``: one server's figures after the other |
| `offline.py` | part ``offline``: ``vllm bench throughput`` |
| `alternate.py`, `room.py` | part ``alternate``: two servers side by side, and whether both fit on a GPU |
| `answers.py` | parts ``logprobs`` and ``recite``: against transformers in float32 |
| `endure.py` | part ``endure``: mixed lengths, aborts, preemption; same answers after it |
| `sleep.py` | part ``sleep``: sleep mode and weights loaded in place |
| `records.py`, `tables.py` | what a part leaves; all of it in one record and as tables |
| `parts.py` | time limits, and what all parts share |

Every part ends by itself within ``--seconds``, writes a record for each thing that it has done, and does not do again
what lies in ``--out``. docs/gpu-runs.md has the commands for a machine that is lent for minutes.
"""
