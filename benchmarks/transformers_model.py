"""Prefill and decode of four layers of a model in transformers, with its experts run in each way: microseconds as JSON.

    python benchmarks/transformers_model.py minimax-m3      # true widths, 58 GB of weights; or gpt-oss-20b, 6.5 GB
    python benchmarks/transformers_model.py gpt-oss-20b --small      # narrow, on a CPU too

Weights are random. Each way runs the same tokens. Beside the times of prefill stands the share of positions whose
likeliest token is eager's, and the median distance of the logits from eager's as a part of their length: random models
route by small differences, so that a few positions may go elsewhere. A decode step is timed as it is, without a graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from epfuse.integrations.transformers import register

WAYS = ("eager", "grouped_mm", "epfuse")
PREFILL, DECODE, CONTEXT, SAMPLES = (64, 512, 2048), (1, 16, 64), 128, 9
"""Tokens of one prompt; sequences of a decode step, whose cache has CONTEXT tokens; timings of each."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax-m3": ("minimax_m3_vl_text", {"moe_layer_freq": [1] * 4, "mlp_layer_types": ["sparse"] * 4}),
    "gpt-oss-20b": ("gpt_oss", {"num_local_experts": 32, "num_experts_per_tok": 4}),
}
SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_local_experts": 8, "vocab_size": 256}


def build(name: str, small: bool, device: torch.device) -> Any:
    """Four layers with random weights in BF16."""
    kind, values = MODELS[name]
    config = AutoConfig.for_model(kind, num_hidden_layers=4, layer_types=None, **values)
    for key, value in SMALL.items() if small else ():
        setattr(config, key, value)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=torch.bfloat16)
    for parameter, weight in model.named_parameters():
        if ".experts." in parameter:
            torch.nn.init.normal_(weight, std=0.02)  # some families leave them as memory was
    return model.eval()


def timed(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Microseconds of a call, host and device together, after two that compile."""
    found = []
    for sample in range(SAMPLES + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if sample >= 2:
            found.append(1e6 * (time.perf_counter() - begin))
    return {"median": statistics.median(found), "least": min(found)}


def beside(logits: torch.Tensor, eager: torch.Tensor) -> dict[str, float]:
    """How near ``[T, vocabulary]`` are to eager's."""
    away = (logits - eager).norm(dim=-1) / eager.norm(dim=-1)
    same = (logits.argmax(-1) == eager.argmax(-1)).float().mean()
    return {"median_distance": away.median().item(), "same_choice": same.item()}


@torch.no_grad()
def main() -> None:
    """Time every way, and print one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", choices=MODELS)
    arguments.add_argument("--small", action="store_true", help="narrow layers and few tokens")
    asked = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    register()
    model = build(asked.model, asked.small, device)
    prefill, decode = ((16,), (2,)) if asked.small else (PREFILL, DECODE)
    vocabulary = model.config.vocab_size
    drawn = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (max(decode), CONTEXT + max(prefill)), generator=drawn).to(device)
    rows, eager = [], {}
    for way in WAYS:
        model.set_experts_implementation(way)
        for count in prefill:
            call = tokens[:1, :count]
            logits = model(call, use_cache=False).logits[0].float()
            row = timed(lambda call=call: model(call, use_cache=False), device)
            near = beside(logits, eager.setdefault(count, logits))
            rows.append({"way": way, "step": "prefill", "tokens": count, **row, **near})
        for count in decode:
            cache = DynamicCache(config=model.config)
            model(tokens[:count, :CONTEXT], past_key_values=cache, use_cache=True)
            step = tokens[:count, CONTEXT : CONTEXT + 1]
            rows.append({"way": way, "step": "decode", "tokens": count}
                        | timed(lambda step=step, cache=cache: model(step, past_key_values=cache), device))  # fmt: skip
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"model": asked.model, "device": name, "versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
