"""One rank's experts of a checkpoint of 2 GB: bytes, seconds and memory beside safetensors' plain load.

    python benchmarks/loading.py FOLDER      # makes the checkpoint there, if it is not there; 2 GB of disk

Each way is a process of its own and runs twice: with the files dropped from the page cache, and with them in it. Bytes
are the kernel's counts in /proc/self/io: those that the process asked for (rchar, of reads alone) and those that came
from the disk (read_bytes, of mapped files too). Memory is the growth of the process' peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epfuse import ExpertMap
from epfuse.weights.checkpoint import ExpertCheckpoint

EXPERTS, HIDDEN, WIDTH, LAYERS, RANKS, RANK = 16, 3072, 1536, 9, 8, 3
MODULE = "model.layers.{}.block_sparse_moe.experts.{}"
MATRICES = {"w1": (WIDTH, HIDDEN), "w3": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH)}
SHARE = ExpertMap.contiguous(EXPERTS, RANKS, RANK)


def make(folder: Path) -> None:
    """Experts of MiniMax-M3's kind in MXFP8, half its widths; a file a layer; random bytes."""
    folder.mkdir(parents=True)
    where = {}
    for layer in range(LAYERS):
        held = {}
        for expert in range(EXPERTS):
            for name, (rows, columns) in MATRICES.items():
                key = f"{MODULE.format(layer, expert)}.{name}.weight"
                held[key] = torch.randint(0, 0x7E, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
                held[f"{key}_scale_inv"] = torch.randint(110, 140, (rows, columns // 32), dtype=torch.uint8)
        file = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        save_file(held, folder / file)
        where |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {
        "model_type": "minimax_m3_vl_text",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 4,
        "moe_layer_freq": [1] * LAYERS,
        "quantization_config": {"quant_method": "mxfp8"},
    }
    (folder / "config.json").write_text(json.dumps(config))


def by_epfuse(folder: Path) -> object:
    """One rank's share, by `ExpertCheckpoint`."""
    return dict(ExpertCheckpoint(folder).load(SHARE))


def by_slices(folder: Path) -> object:
    """One rank's share, tensor by tensor with safe_open, then copied together as a layer needs them."""
    kept = []
    experts = [expert for expert, slot in enumerate(SHARE.on(torch.device("cpu")).tolist()) if slot >= 0]
    for file in sorted(folder.glob("*.safetensors")):
        layer = int(file.name[6:11]) - 1
        with safe_open(file, "pt") as held:

            def stack(names: tuple[str, ...], end: str, layer: int = layer, held: object = held) -> torch.Tensor:
                get = held.get_tensor  # type: ignore[attr-defined]
                keys = [[f"{MODULE.format(layer, expert)}.{name}.{end}" for name in names] for expert in experts]
                return torch.stack([torch.cat([get(key).view(torch.uint8) for key in own]) for own in keys])

            kept += [stack(names, end) for names in (("w1", "w3"), ("w2",)) for end in ("weight", "weight_scale_inv")]
    return kept


def by_load_file(folder: Path) -> object:
    """All tensors, by safetensors' load_file; every byte is touched, as a copy to a device would."""
    held = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    sum(int(tensor.view(torch.uint8).amax()) for file in held for tensor in file.values())
    return held


WAYS: dict[str, Callable[[Path], object]] = {"epfuse": by_epfuse, "slices": by_slices, "load_file": by_load_file}


def counts() -> dict[str, int]:
    """What this process has read and taken so far, in bytes."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = {name: int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon")}
    return {"asked": int(io["rchar"]), "disk": int(io["read_bytes"]), **own}


def measure(way: str, folder: Path) -> None:
    """One way in this process; its record goes to stdout."""
    before, begin = counts(), time.perf_counter()
    result = WAYS[way](folder)
    seconds, after = time.perf_counter() - begin, counts()
    grown = {name: after[name] - before[name] for name in after}
    print(json.dumps({"seconds": seconds, **grown, "kept": result is not None}))


def drop(folder: Path) -> None:
    """Forget the files' pages; no privilege is needed for clean ones."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    """Measure every way, cold and warm."""
    if len(sys.argv) == 3:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    folder = Path(sys.argv[1])
    if not folder.exists():
        make(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    share = ExpertCheckpoint(folder).bytes_of(SHARE)
    print(f"{size / 1e9:.3f} GB in {LAYERS} files; rank {RANK} of {RANKS} needs {share / 1e6:.2f} MB")
    print("| way | cache | MB asked for | MB from the disk | seconds | peak, MB | of it anonymous, MB |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        for cache in ("cold", "warm"):
            if cache == "cold":
                drop(folder)
            ran = subprocess.run([sys.executable, __file__, way, str(folder)], capture_output=True, check=True)
            found = json.loads(ran.stdout)
            numbers = [found[name] / 1e6 for name in ("asked", "disk")]
            peak = [found[name] / 1e6 for name in ("VmHWM", "RssAnon")]
            print(
                f"| {way} | {cache} | {numbers[0]:.1f} | {numbers[1]:.1f} | {found['seconds']:.2f} |"
                f" {peak[0]:.1f} | {peak[1]:.1f} |"
            )


if __name__ == "__main__":
    main()
