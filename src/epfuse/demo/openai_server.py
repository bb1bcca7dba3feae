"""``python -m epfuse.demo.openai_server``: the demo's small MiniMax-M3 behind OpenAI's completions API.

Not vLLM, and it says so: a process of its own for `epfuse serve run --local-demo` where no vLLM is installed. The model
is transformers' own code with weights from a seed; its experts are transformers' (``eager``) or epfuse's (``epfuse``,
as if on several ranks, one after the other). Requests take turns, a step each; greedy decoding only.
"""

from __future__ import annotations

import argparse
import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from epfuse.demo.model import build_model, seed_weights
from epfuse.demo.settings import ModelSize
from epfuse.demo.text import BOS, VOCAB, decode, encode
from epfuse.integrations.transformers import EPExperts, activation_of
from epfuse.integrations.transformers.layout import is_experts
from epfuse.parallel.group import EPGroup
from epfuse.parallel.shard import shard_experts
from epfuse.weights.experts import ExpertWeights

LABEL = "a small MiniMax-M3 in transformers behind epfuse's demo server; not vLLM"
SIZE = ModelSize(hidden=128, intermediate=64, dense_intermediate=128, dense_layers=1, moe_layers=2, experts=16)
LONGEST = 2048
LONGEST_BODY = 1 << 20


class Refused(Exception):
    """A request that the server does not take."""


class AllRanks(nn.Module):
    """Expert parallelism in one process: the ranks' parts, each computed by `EPExperts`, added up.

    Args:
        name: of the module whose place it takes.
        experts: transformers' module.
        ranks: P.
    """

    def __init__(self, name: str, experts: Any, ranks: int) -> None:
        super().__init__()
        self.ranks: list[EPExperts] = []
        for rank in range(ranks):
            group = EPGroup(rank, ranks)
            share = group.expert_map(experts.gate_up_proj.shape[0])
            w13, w2 = (shard_experts(weight.detach(), share) for weight in (experts.gate_up_proj, experts.down_proj))
            self.ranks.append(EPExperts(ExpertWeights.dense(w13, w2), share, activation_of(name, experts), group))

    def forward(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """As the module that it stands for: ``[T, H]`` in and out."""
        parts = [rank.local_output(hidden, topk_ids, topk_weights) for rank in self.ranks]
        return torch.stack(parts).sum(0)


def load_model(experts: str, ranks: int, seed: int) -> Any:
    """The model, with its experts on as many ranks."""
    model: Any = build_model(SIZE, torch.float32, "cpu")
    seed_weights(model, seed)
    if experts == "epfuse":
        for name, module in [(name, module) for name, module in model.named_modules() if is_experts(module)]:
            model.set_submodule(name, AllRanks(name, module, ranks))
    return model


class Engine:
    """The model; requests take turns, a step each."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._turn = threading.Lock()

    @torch.inference_mode()
    def run(self, prompt: list[int], new_tokens: int) -> Iterator[tuple[list[int], list[float]]]:
        """First the prompt's tokens with their log probabilities (the first one's is 0), then each new one's."""
        cache = DynamicCache(config=self._model.config)
        read = torch.tensor([prompt])
        for step in range(new_tokens + 1):
            with self._turn:
                logits = self._model(read, past_key_values=cache, use_cache=True).logits[0].float()
            logprobs = logits.log_softmax(-1)
            if step == 0:
                seen = logprobs[:-1].gather(1, read[0, 1:, None])[:, 0].tolist()
                yield prompt, [0.0, *seen]
            if step == new_tokens:
                return
            token = int(logprobs[-1, :BOS].argmax())
            yield [token], [float(logprobs[-1, token])]
            read = torch.tensor([[token]])


class Handler(http.server.BaseHTTPRequestHandler):
    """``/health``, ``/v1/models``, ``/v1/completions``."""

    engine: Engine
    model_name: str

    def log_message(self, *_: object) -> None:
        """Nothing: a line a request would fill the log."""

    def do_GET(self) -> None:
        """Health and the model's name."""
        if self.path == "/health":
            self._answer(200, {})
        elif self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": [{"id": self.model_name, "object": "model"}]})
        else:
            self._answer(404, {"error": {"message": f"{self.path}: there is no such thing here"}})

    def do_POST(self) -> None:
        """A completion."""
        try:
            body = self._body()
            prompt, new_tokens = _prompt(body), _new_tokens(body)
            if len(prompt) + new_tokens > LONGEST:
                raise Refused(f"prompt and answer have {len(prompt) + new_tokens} tokens; {LONGEST} is the most")
        except Refused as refused:
            self._answer(400, {"error": {"message": str(refused)}})
            return
        steps = self.engine.run(prompt, new_tokens)
        if body.get("stream"):
            self._stream(steps, len(prompt))
        else:
            self._complete(body, steps, len(prompt))

    def _body(self) -> dict[str, Any]:
        if self.path != "/v1/completions":
            raise Refused(f"{self.path}: only /v1/completions is here")
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= LONGEST_BODY:
                raise Refused(f"a request has {LONGEST_BODY} bytes at the most")
            body = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise Refused(f"no JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refused("the request is no JSON object")
        if body.get("model") != self.model_name:
            raise Refused(f"model is {body.get('model')!r:.100}; {self.model_name!r} is here")
        if body.get("temperature", 0) != 0:
            raise Refused("temperature must be 0: this server decodes greedily")
        return body

    def _complete(self, body: dict[str, Any], steps: Iterator[tuple[list[int], list[float]]], prompt: int) -> None:
        tokens: list[int] = []
        logprobs: list[float | None] = []
        for step_tokens, step_logprobs in steps:
            tokens += step_tokens
            logprobs += step_logprobs
        logprobs[0] = None
        begin = 0 if body.get("echo") else prompt
        choice: dict[str, Any] = {"index": 0, "text": decode(tokens[begin:]), "finish_reason": "length"}
        if body.get("logprobs") is not None:
            words = [f"token_id:{token}" for token in tokens[begin:]]
            choice["logprobs"] = {"tokens": words, "token_logprobs": logprobs[begin:]}
        self._answer(200, {"object": "text_completion", "model": self.model_name, "choices": [choice],
                           "usage": _usage(prompt, len(tokens) - prompt)})  # fmt: skip

    def _stream(self, steps: Iterator[tuple[list[int], list[float]]], prompt: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        count = -1
        for tokens, _ in steps:
            count += 1
            if count:  # the first step is the prompt
                self._event({"choices": [{"index": 0, "text": decode(tokens)}]})
        self._event({"choices": [], "usage": _usage(prompt, count)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _prompt(body: dict[str, Any]) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) and prompt:
        return encode(prompt.encode(errors="replace"), LONGEST)
    if isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < VOCAB for token in prompt):
        return prompt
    raise Refused(f"prompt must be a text, or a list of tokens below {VOCAB}; several prompts need several requests")


def _new_tokens(body: dict[str, Any]) -> int:
    count = body.get("max_tokens", 16)
    if type(count) is not int or not 0 <= count <= LONGEST:
        raise Refused(f"max_tokens is {count!r:.40}; it must be in 0..{LONGEST}")
    return count


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def serve(model: Any, port: int, model_name: str) -> None:
    """Answer requests to this machine until the process ends."""
    Handler.engine, Handler.model_name = Engine(model), model_name
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    server.serve_forever()


def main(arguments: list[str]) -> None:
    """Parse and serve."""
    parser = argparse.ArgumentParser(prog="python -m epfuse.demo.openai_server", description=LABEL)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model-name", required=True, help="what the API calls the model")
    parser.add_argument("--experts", choices=["eager", "epfuse"], required=True, help="transformers' or epfuse's")
    parser.add_argument("--ranks", type=int, default=1, help="with epfuse: ranks that share the experts")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.monotonic()
    model = load_model(options.experts, options.ranks, options.seed)
    ranks = f" on {options.ranks} ranks in one process" if options.experts == "epfuse" else ""
    print(f"{LABEL}; experts: {options.experts}{ranks}; {time.monotonic() - began:.1f} s to build", flush=True)
    serve(model, options.port, options.model_name)


if __name__ == "__main__":
    main(sys.argv[1:])
