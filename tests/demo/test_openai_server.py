"""The demo's server, and the gate of `epfuse serve` before it: a real model, right and wrong."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
import torch

from epfuse.demo.openai_server import AllRanks, Engine, Handler, load_model
from epfuse.integrations.transformers.layout import is_experts
from epfuse.serving import gate
from epfuse.serving.point import AccuracyGate
from epfuse.serving.server import ask
from epfuse.serving.stream_load import request

GATE = AccuracyGate(
    prompts=(
        "Experts wait in line: half of them here, half of them there.",
        "for i in range(10): print(i * i)",
    ),
    repeats=1,
    greedy_tokens=4,
)


@pytest.fixture(scope="module")
def serving():
    """Serve a model here; the port."""
    servers = []

    def serve(model) -> int:
        handler = type("OneModel", (Handler,), {"engine": Engine(model), "model_name": "m3"})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_address[1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(serving):
    port = serving(load_model("eager", 1, 0))
    return gate.reference_of([gate.read(port, "m3", GATE, at_once, 60) for at_once in (1, 3)])


def judged(serving, reference, model):
    return gate.judge(gate.read(serving(model), "m3", GATE, 1, 60), reference, GATE)


@pytest.mark.parametrize("ranks", [1, 4])
def test_our_experts_pass(serving, reference, ranks):
    result = judged(serving, reference, load_model("epfuse", ranks, 0))
    assert result.passed, result.reason
    assert result.difference < 1e-4
    assert result.greedy_equal == result.greedy_total == 8


def test_a_rank_without_its_experts_is_gated_out(serving, reference):
    model = load_model("epfuse", 4, 0)
    layer = next(module for module in model.modules() if isinstance(module, AllRanks))
    del layer.ranks[2]
    result = judged(serving, reference, model)
    assert not result.passed
    assert result.difference > result.allowed


def test_two_exchanged_experts_are_gated_out(serving, reference):
    model = load_model("eager", 1, 0)
    experts = next(module for module in model.modules() if is_experts(module))
    with torch.no_grad():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight[[3, 11]] = weight[[11, 3]].clone()
    assert not judged(serving, reference, model).passed


def test_another_model_is_gated_out(serving, reference):
    assert not judged(serving, reference, load_model("eager", 1, 1)).passed


def test_a_stream_says_what_the_answer_says(serving):
    port = serving(load_model("epfuse", 2, 0))
    body = {"model": "m3", "prompt": [72, 101, 108], "max_tokens": 5}
    status, answer = ask(port, "POST", "/v1/completions", body)
    assert status == 200
    streamed = request("127.0.0.1", port, "m3", [72, 101, 108], 5)
    assert not streamed.error
    assert streamed.text == json.loads(answer)["choices"][0]["text"]
    assert (streamed.tokens, len(streamed.itls)) == (5, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"prompt": ""},
        {"prompt": [[1]]},
        {"prompt": [257]},
        {"max_tokens": -1},
        {"max_tokens": 4096},
        {"temperature": 0.5},
    ],
)
def test_what_it_does_not_take_is_refused(serving, change):
    port = serving(torch.nn.Identity())
    body = {"model": "m3", "prompt": "x", "max_tokens": 1} | change
    status, answer = ask(port, "POST", "/v1/completions", body)
    assert status == 400
    assert next(iter(change)) in json.loads(answer)["error"]["message"] or "prompt" in change or "max_tokens" in change
