"""Python, epfuse, its environment variables, and the packages that it stands on; nothing here asks a GPU."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import platform
import re
import sys

from epfuse.doctor.finding import Answer, bad, good, warning
from epfuse.doctor.gpu import vendor
from epfuse.integrations.installed import package_of, version_of

LEAST_PYTHON = (3, 11)
LEAST_TORCH = (2, 10)
LEAST_TRITON = (3, 6)
TRANSFORMERS = (5, 23), (6,)
"""From, and below."""
OWN = "EPFUSE_SERVE_"
"""What epfuse's own processes tell each other."""


def numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0); empty if it does not begin with a number."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def python() -> Answer:
    """The interpreter and the machine's kind."""
    found = f"{platform.python_version()} ({platform.python_implementation()}, {sys.platform} {platform.machine()})"
    if sys.version_info[:2] < LEAST_PYTHON:
        return bad(found, "epfuse needs Python 3.11 or newer")
    return good(found)


def epfuse() -> Answer:
    """This package, and whether what is installed is what is imported."""
    from epfuse import __version__

    try:
        installed = importlib.metadata.version("epfuse")
    except importlib.metadata.PackageNotFoundError:
        return warning(
            f"{__version__}, imported from its source, not installed",
            "pip install it: vLLM and SGLang find their plugins in what is installed",
        )
    if installed != __version__:
        return warning(
            f"{__version__} is imported, {installed} is installed", "pip install it again, or leave its source's folder"
        )
    return good(__version__)


def environment_variables() -> Answer:
    """Whether epfuse's variables have values that it takes, and names that it knows."""
    from epfuse.environment import VARIABLES, environment
    from epfuse.errors import ConfigError
    from epfuse.integrations.switches import SWITCHES, is_on

    ours = {name: value for name, value in os.environ.items() if name.startswith("EPFUSE_")}
    ours = {name: value for name, value in ours.items() if not name.startswith(OWN)}
    try:
        environment()
        for switch in SWITCHES:
            is_on(switch)
    except ConfigError as error:
        return bad(str(error), "give it one of these values, or unset it")
    known = {*VARIABLES, *SWITCHES}
    unknown = sorted(ours.keys() - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
        return warning(f"epfuse has no variable {', '.join(unknown)}", meant)
    return good(", ".join(f"{name}={ours[name]}" for name in sorted(ours)) or "no EPFUSE_ variable is set")


def torch() -> Answer:
    """PyTorch, and what it was built for."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    built = built or (f"ROCm {torch.version.hip}" if torch.version.hip else "CPUs")
    found = f"{torch.__version__}, built for {built}"
    if numbers(torch.__version__) < LEAST_TORCH:
        return bad(found, "epfuse needs torch 2.10 or newer")
    return good(found)


def triton() -> Answer:
    """Triton, without which no GPU kernel is compiled."""
    try:
        import triton
    except ModuleNotFoundError:
        if vendor() is None:
            return warning(
                "not installed; the CPU's family needs none", "to compile for GPUs: pip install 'epfuse[cpu]'"
            )
        return bad("not installed", "install a GPU build of torch, which brings it")
    if numbers(triton.__version__) < LEAST_TRITON:
        return bad(triton.__version__, "epfuse needs triton 3.6 or newer: torch's GPU builds from 2.10 on bring it")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return warning(
            f"{triton.__version__}; TRITON_INTERPRET has kernels interpreted, on the host and slowly",
            "unset TRITON_INTERPRET",
        )
    return good(triton.__version__)


def transformers() -> Answer:
    """Transformers, which `epfuse demo` and `replace_experts` work on."""
    if package_of("transformers") is None:
        return good("not installed; 'epfuse demo' needs it: pip install 'epfuse[demo]'")
    version = version_of("transformers")
    least, below = TRANSFORMERS
    if not least <= numbers(version) < below:
        return warning(f"{version} is not one that epfuse was tested with", "pip install 'transformers>=5.23,<6'")
    return good(version)


def nccl() -> Answer:
    """What ranks talk through."""
    import torch
    import torch.distributed

    if not torch.distributed.is_available():
        return warning("torch has no torch.distributed", "several ranks need a torch that was built with it")
    if torch.version.cuda is None and torch.version.hip is None:
        return good("none; ranks on CPUs talk through gloo")
    if not torch.distributed.is_nccl_available():
        return warning("torch was built without it", "several GPUs need a torch that was built with it")
    name = "RCCL" if torch.version.hip else "NCCL"
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return good(f"{name} {'.'.join(map(str, version))}")
