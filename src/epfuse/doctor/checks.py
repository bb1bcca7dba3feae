"""What `epfuse doctor` looks at, in its order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: the line's.
        look: ``module:function`` of a function without arguments that returns an `Answer`; imported where it runs.
        seconds: the most that it may take, with the imports that it is the first to need.
        needs: names of all earlier checks without which this one says nothing: where one is bad, it is not begun.
    """

    name: str
    look: str
    seconds: float = 30.0
    needs: tuple[str, ...] = ()


HERE = "epfuse.doctor"

CORE = ("Environment", "torch")
DEVICE = (*CORE, "GPU")
CHECKS = (
    Check("Python", f"{HERE}.software:python"),
    Check("epfuse", f"{HERE}.software:epfuse"),
    Check("Environment", f"{HERE}.software:environment_variables", 90.0),
    Check("torch", f"{HERE}.software:torch", 90.0),
    Check("triton", f"{HERE}.software:triton"),
    Check("Driver", f"{HERE}.gpu:driver"),
    Check("GPU", f"{HERE}.gpu:gpu", 60.0, ("torch",)),
    Check("Target", f"{HERE}.gpu:target", 30.0, DEVICE),
    Check("NCCL", f"{HERE}.software:nccl", 30.0, ("torch",)),
    Check("C compiler", f"{HERE}.compiling:compiler", 30.0, ("Environment",)),
    Check("ptxas", f"{HERE}.compiling:ptxas", 30.0, ("triton",)),
    Check("Kernel cache", f"{HERE}.compiling:cache", 30.0, (*CORE, "triton")),
    Check("Kernel bundle", f"{HERE}.compiling:kernel_bundle", 60.0, DEVICE),
    Check("Tuned tables", f"{HERE}.gpu:tuned_tables", 30.0, DEVICE),
    Check("transformers", f"{HERE}.software:transformers"),
    Check("vLLM", f"{HERE}.servers:vllm", 30.0, ("Environment",)),
    Check("SGLang", f"{HERE}.servers:sglang", 30.0, ("Environment",)),
    Check("Call", f"{HERE}.call:call", 180.0, DEVICE),
)
"""The limits are for cold disks and, of the call, for compiling; a machine that is well takes some five seconds."""
