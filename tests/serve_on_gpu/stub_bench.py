"""Stands for `tools.serve_on_gpu.bench`'s process: vLLM's arguments, measured by epfuse's own load generator."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from epfuse.serving.stream_load import measure

for line in sys.stdin:
    argv = json.loads(line)
    given = dict(zip(argv, [*argv[1:], ""], strict=True))
    options = argparse.Namespace(
        host=given["--host"],
        port=int(given["--port"]),
        model=given["--model"],
        prompts=int(given["--num-prompts"]),
        concurrency=int(given["--max-concurrency"]),
        warmups=int(given["--num-warmups"]),
        isl=int(given["--random-input-len"]),
        osl=int(given["--random-output-len"]),
        shortest_share=1.0,
        seed=0,
    )
    if options.isl == 99:
        sys.exit("killed")
    found = measure(options)
    found |= {"median_tpot_ms": 2.0 * options.concurrency, "p99_ttft_ms": 100.0}
    (Path(given["--result-dir"]) / given["--result-filename"]).write_text(json.dumps(found))
    print(json.dumps({"error": ""}), flush=True)
