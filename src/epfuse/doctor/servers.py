"""vLLM and SGLang, and whether epfuse's plugins stand down in them: the plugins' own questions, asked outside."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from epfuse.doctor.finding import Answer, bad, good, warning
from epfuse.integrations.interfaces import ServerProject
from epfuse.integrations.switches import DISABLE, FORCE, is_on


@dataclass(frozen=True)
class Plugin:
    """How a server finds epfuse's plugin, and what makes the plugin stand down.

    Attributes:
        server: which.
        package: where the one lies that would be imported; None without one.
        version: of it, for messages.
        tested: releases.
        install: what pip is told, with the newest of them.
        group: of the entry points that it loads.
        variable: of the environment, that may name the plugins to load.
        named: what its value names; None for all.
        force: variable that has a plugin used in a release that is not as the tested ones; None if there is none.
        patched: whether a package loads epfuse without the entry point.
    """

    server: ServerProject
    package: Path | None
    version: str
    tested: tuple[str, ...]
    install: str
    group: str
    variable: str
    named: Callable[[str], list[str] | None]
    force: str | None = None
    patched: bool = False


def vllm() -> Answer:
    """What vLLM would do with the plugin."""
    from epfuse.integrations.vllm import releases
    from epfuse.integrations.vllm.interfaces import VLLM

    package = releases.package()
    return look(
        Plugin(
            server=VLLM,
            package=package,
            version=releases.installed(),
            tested=releases.TESTED,
            install=f"vllm=={releases.TESTED[-1]}",
            group="vllm.general_plugins",
            variable="VLLM_PLUGINS",
            named=lambda value: value.split(","),
            force=FORCE,
            patched=package is not None and _is_patched(package),
        )
    )


def sglang() -> Answer:
    """What SGLang would do with the plugin."""
    from epfuse.integrations.sglang import releases
    from epfuse.integrations.sglang.interfaces import SGLANG

    return look(
        Plugin(
            server=SGLANG,
            package=releases.package(),
            version=releases.installed(),
            tested=releases.TESTED,
            install=f"sglang=={releases.TESTED[-1]}",
            group="sglang.srt.plugins",
            variable="SGLANG_PLUGINS",
            named=lambda value: [name.strip() for name in value.split(",")] if value else None,
        )
    )


def look(plugin: Plugin) -> Answer:
    """Whether the plugin would register, and every reason why not."""
    name = plugin.server.name
    if plugin.package is None:
        return good("not installed")
    found = f"{name} {plugin.version}"
    wanted: list[str] = []  # reasons that somebody chose
    faults: list[tuple[str, str]] = []  # reasons that nobody chose, and the fix of each
    if not plugin.patched and not importlib.metadata.entry_points(group=plugin.group, name="epfuse"):
        faults.append(("epfuse has no entry point here", "pip install epfuse in this environment"))
    match = plugin.server.nearest(plugin.package)
    forced = plugin.force is not None and is_on(plugin.force)
    if match.differences and not forced:
        use = f", or {plugin.force}=1 to use it all the same, untested" if plugin.force else ""
        faults.append(
            (
                f"it is not as the tested releases ({', '.join(plugin.tested)}): {match}",
                f"pip install '{plugin.install}'{use}",
            )
        )
    value = os.environ.get(plugin.variable)
    listed = None if value is None else plugin.named(value)
    if listed is not None and "epfuse" not in listed:
        wanted.append(f"{plugin.variable}={value} does not name epfuse")
    if is_on(DISABLE):
        wanted.append(f"{DISABLE}=1")
    if faults:
        reasons = "; ".join([reason for reason, _ in faults] + wanted)
        return bad(f"{found}: the plugin stands down: {reasons}", "; ".join(fix for _, fix in faults))
    if wanted:
        return warning(
            f"{found}: the plugin stands down: {'; '.join(wanted)}", "if that is not wanted, change these variables"
        )
    if match.differences:
        return warning(
            f"{found}: {plugin.force}=1 has the plugin used in a release that is not as the tested ones: {match}",
            f"pip install '{plugin.install}' and unset {plugin.force}",
        )
    like = "" if plugin.version == match.release else f", which looks like {match.release}"
    return good(f"{found}{like}: the plugin is going to register{' (the patch loads it)' if plugin.patched else ''}")


def _is_patched(package: Path) -> bool:
    from epfuse.errors import ConfigError
    from epfuse.input_file import read_file
    from epfuse.integrations.vllm.patch.block import BEGIN, TARGETS

    try:
        return any(BEGIN in read_file(package.parent / path, "vLLM's") for path in TARGETS)
    except ConfigError:
        return False
