"""A trace that a server writes when it is asked, and the phases of it."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

from epfuse.serving import trace
from epfuse.serving.layout import LegFolder
from epfuse.serving.phases import read_phases
from epfuse.serving.point import Client

REAL = Path(__file__).parents[1] / "data" / "mi300x-vllm-decode-gptoss.trace.json.gz"
CLIENT = Client(tool="builtin", prompts=4, concurrency=2, warmups=0, isl=8, osl=4)


@pytest.fixture
def traced(tmp_path):
    """A server that answers as vLLM's profiler does; ``writes`` are the files that it leaves."""
    folder, leg = tmp_path / "traces", tmp_path / "leg-1-baseline"
    folder.mkdir()
    leg.mkdir()
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        writes: tuple[str, ...] = ()
        status = 200

        def log_message(self, *_):
            pass

        def do_POST(self):
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/stop_profile":
                for name in self.writes:
                    shutil.copy(REAL, folder / name)
            self.send_response(self.status)
            self.end_headers()
            if self.path == "/v1/completions":
                self.wfile.write(b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def take(*writes: str, status: int = 200) -> LegFolder:
        Handler.writes, Handler.status = writes, status
        trace.take(server.server_address[1], "m", CLIENT, folder, LegFolder(leg))
        assert asked == ["/start_profile", *["/v1/completions"] * 2, "/stop_profile"]
        return LegFolder(leg)

    yield take
    server.shutdown()
    server.server_close()


def test_one_trace_and_its_phases(traced):
    leg = traced("dp0_pp0_tp1_rank1.pt.trace.json.gz", "dp0_pp0_tp0_rank0.pt.trace.json.gz")
    assert leg.trace.read_bytes() == REAL.read_bytes()
    assert not list((leg.path.parent / "traces").iterdir())
    phases = {phase.name: phase for phase in read_phases(leg.profile).phases}
    assert phases["expert GEMM 1"].calls == 24
    assert phases["expert GEMM 1"].ms == pytest.approx(3.272717)


def test_no_trace_is_named(traced):
    with pytest.raises(trace.TraceFault, match="wrote no trace"):
        traced()


def test_a_server_without_a_profiler_is_named(traced):
    with pytest.raises(trace.TraceFault, match="/start_profile with 404"):
        traced(status=404)


def test_the_servers_arguments_are_vllms(tmp_path):
    option, value = trace.server_arguments(tmp_path)
    assert option == "--profiler-config"
    assert json.loads(value) == {"profiler": "torch", "torch_profiler_dir": str(tmp_path)}
