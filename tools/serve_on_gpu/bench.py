"""``vllm bench serve`` as a process that is started once and measures many times: imports take as long as a point.

The process (``python3 -m tools.serve_on_gpu.bench``) reads lists of arguments, a line of JSON each, and answers each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from epfuse.children import Children
from epfuse.serving.environments import Task
from epfuse.serving.load import LoadFault, load_command, read_result
from epfuse.serving.point import Client


class ServingBench:
    """The process; it imports while the first server starts.

    Args:
        task: its command and environment.
        log: what it prints is appended there.

    Raises:
        OSError: it can't be started.
    """

    def __init__(self, task: Task, log: Path) -> None:
        self._log, self._children, self._lock = log, Children(), threading.Lock()
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                list(task.argv),
                env=task.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                process_group=self._children.id,
            )

    def __enter__(self) -> ServingBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._children.end()
        self._process.wait()

    def measure(self, client: Client, model: str, port: int, result: Path) -> dict[str, float]:
        """One load, as `epfuse.serving.load` describes it, with greedy decoding.

        Raises:
            LoadFault: there is no result that counts.
        """
        argv = load_command(client.model_copy(update={"command": ("bench",)}), model, "127.0.0.1", port, result)
        answer = self._ask([*argv[1:], "--temperature", "0", "--disable-tqdm"])
        if answer.get("error"):
            raise LoadFault(f"vllm bench serve: {answer['error']}")
        return read_result(client, result)

    def _ask(self, argv: list[str]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(argv) + "\n")
                self._process.stdin.flush()
                answer = json.loads(self._process.stdout.readline())
            except (OSError, ValueError):
                tail = self._log.read_text(errors="replace").strip()[-500:]
                raise LoadFault(f"the process of vllm bench serve has ended: {tail}") from None
        if not isinstance(answer, dict):
            raise LoadFault(f"the process of vllm bench serve answers {answer!r:.80}")
        return answer


def main() -> None:
    """Answer until the input ends; what vLLM prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    for line in sys.stdin:
        error = ""
        try:
            serve.main(parser.parse_args(json.loads(line)))
        except (Exception, SystemExit) as raised:  # an argument that it does not know exits
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
        answers.write(json.dumps({"error": error}) + "\n")


if __name__ == "__main__":
    main()
