"""A small MiniMax-M3 with weights from a seed: on disk as vLLM loads it, and in transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.integrations.vllm_e2e.checkpoint import Kind, build, write_model

from epfuse.demo.settings import ModelSize
from epfuse.demo.text import encode
from epfuse.serving.gate import Reading

ATTENTION = {"heads": 64, "key_heads": 4, "head_dim": 128}
"""MiniMax-M3's own: what vLLM's kernels for it have been seen with."""
READING = Kind(
    ModelSize(
        hidden=2048, intermediate=1024, dense_intermediate=4096, dense_layers=1, moe_layers=2, experts=32, top_k=4
    ),
    positions=4096,
    recites=False,
    **ATTENTION,
)
"""Small enough to be made, loaded and compared in float32 within seconds."""
RECITING = Kind(positions=4096, **ATTENTION)
FORMS = ("mxfp8", "bf16")


def write(folder: Path, kind: Kind, forms: tuple[str, ...] = FORMS) -> Any:
    """A checkpoint a format, all with the same numbers, in folders named by them.

    Returns:
        The model in transformers, float32.
    """
    model = build(kind)
    for form in forms:
        (folder / form).mkdir(parents=True, exist_ok=True)
        write_model(folder / form, model, kind, mxfp8=form == "mxfp8")
    return model


@torch.no_grad()
def read(model: Any, texts: tuple[str, ...]) -> Reading:
    """What the model itself says of texts, in float32 throughout: of each token but the first, nats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model.to(device)
    found = []
    try:
        for text in texts:
            data = text.encode()
            ids = torch.tensor(encode(data, 1 + len(data)), device=device)
            logits = model(ids[None], use_cache=False).logits[0, :-1].float()
            values = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found.append(tuple(float(value) for value in values))
    finally:
        model.to("cpu")
        torch.set_float32_matmul_precision(before)
    return Reading(tuple(found), tuple(() for _ in texts))
