"""The driver, the GPUs, their kernels, and what was measured on them."""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from epfuse.doctor.finding import Answer, bad, good, warning

if TYPE_CHECKING:
    import torch

    from epfuse.target import Target

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
LEAST_FREE = 2 << 30
"""Bytes of a GPU's memory, below which hardly a layer fits."""


class Vendor(enum.Enum):
    """Whose driver is there."""

    NVIDIA = "NVIDIA"
    AMD = "AMD"


def vendor(root: Path = Path("/")) -> Vendor | None:
    """Whose GPU this process may open, by its device files: asking a driver may take for ever."""
    if any((root / "dev" / name).exists() for name in ("nvidiactl", "nvidia0", "dxg")):
        return Vendor.NVIDIA
    return Vendor.AMD if (root / "dev/kfd").exists() else None


def driver(root: Path = Path("/")) -> Answer:
    """The kernel's driver."""
    found = vendor(root)
    if found is None:
        return warning(
            "no GPU's device files (/dev/nvidiactl, /dev/kfd)",
            "on a machine with a GPU: install its driver; in a container: start it with --gpus all (NVIDIA) or"
            " --device /dev/kfd --device /dev/dri (AMD)",
        )
    if found is Vendor.AMD:
        if not os.access(root / "dev/kfd", os.R_OK | os.W_OK):
            return bad("AMD; /dev/kfd may not be opened", "add the user to the groups render and video")
        return good(f"AMD {_text(root / 'sys/module/amdgpu/version') or 'of the Linux kernel'}")
    version = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", _text(root / "proc/driver/nvidia/version"))
    version = version or re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", _nvidia_smi())
    if version is None:
        return bad("NVIDIA; it does not say its version", "see what nvidia-smi says; load or install the driver")
    return good(f"NVIDIA {version[0]}")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _nvidia_smi() -> str:
    found = shutil.which("nvidia-smi")
    if found is None:
        return ""
    command = [found, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout


def gpu() -> Answer:
    """The GPUs that torch sees."""
    import torch

    from epfuse.errors import UnsupportedTarget
    from epfuse.target import target_of

    if not torch.cuda.is_available():
        return _why_none()
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    products = Counter(product_words(torch.cuda.get_device_name(device)) for device in devices)
    words = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in products.items())
    for device in devices:
        try:
            target_of(device)
        except UnsupportedTarget as error:
            return bad(
                f"{words}: {error}",
                f"make only supported GPUs visible ({VISIBLE[0]}), or run on the CPU: device='cpu'",
            )
    free, total = torch.cuda.mem_get_info(devices[0])
    words = f"{words}; {free / 2**30:.0f} of {total / 2**30:.0f} GiB free on the first"
    if free < LEAST_FREE:
        return warning(words, "end what else is using its memory")
    return good(words)


def product_words(device_name: str) -> str:
    """A GPU as torch names it, and its short name in ``epfuse plan`` if it has one."""
    from epfuse.hardware.products import PRODUCTS

    short = [name for name, product in PRODUCTS.items() if product.device_name == device_name]
    return f"{device_name} ({short[0]})" if short else device_name


def _why_none() -> Answer:
    import torch

    found = vendor()
    if found is None:
        return warning("none; calls run on the CPU", "kernels need an H100, H200, MI300X, MI325X, MI350X or MI355X")
    hidden = [f"{name}={os.environ[name]!r}" for name in VISIBLE if os.environ.get(name) in ("", "-1")]
    if hidden:
        return warning(f"an {found.value} GPU is there and hidden by {hidden[0]}", "unset it, or name the GPU")
    build = torch.version.cuda if found is Vendor.NVIDIA else torch.version.hip
    if build is None:
        system = "CUDA" if found is Vendor.NVIDIA else "ROCm"
        return bad(
            f"an {found.value} GPU is there, and this torch was not built for it",
            f"install torch's build for {system}: https://pytorch.org/get-started/locally",
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever the driver says
        return bad(
            f"an {found.value} GPU is there, and torch can't use it: {error}",
            "update the driver, or install a torch built for the one that is there",
        )
    return bad(f"an {found.value} GPU is there, and torch sees none", "see what nvidia-smi or amd-smi says")


def this_device() -> torch.device:
    """What a call would run on: the first GPU, else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def target() -> Answer:
    """The kernels that calls run on."""
    from epfuse.families.registry import FAMILIES, READABLE
    from epfuse.target import target_of

    found = target_of(this_device())
    families = [family.name for family in FAMILIES if found in family.reads]
    paths = ", ".join(path.value for path in READABLE[found])
    return good(f"{found.value}: paths {paths}; families {', '.join(families)}")


def tuned_tables() -> Answer:
    """Which measured tiles calls on this device find."""
    from epfuse.target import device_name, target_of

    device = this_device()
    return tables_for(target_of(device), device_name(device))


def tables_for(target: Target, device_name: str) -> Answer:
    """Which measured tiles calls find.

    Args:
        target: whose kernels.
        device_name: the product, as torch names it.
    """
    from epfuse.families.family import Stage
    from epfuse.measured.store import shipped

    if not target.is_gpu:
        return good("none needed: a CPU multiplies with torch's library")
    rows = [measurement for stage in Stage for measurement in shipped(target, stage).measurements]
    own = [measurement for measurement in rows if measurement.device == device_name]
    tune = "'epfuse tune' measures a layer here; 'epfuse plan' says which tiles a model's layers get"
    if not own:
        others = sorted({measurement.device for measurement in rows})
        instead = (
            f"layers near to those of {', '.join(others)} take their tiles" if others else "default tiles are used"
        )
        return warning(f"nothing was measured on {device_name}; {instead}", tune)
    layers = {measurement.shape for measurement in own}
    paths = sorted({measurement.path.value for measurement in own})
    newest = max(own, key=lambda measurement: measurement.date)
    return good(
        f"{len(layers)} layers measured on {device_name} ({', '.join(paths)}), the newest {newest.date.isoformat()}"
        f" with triton {newest.triton}"
    )
