"""Takes out of a finding what is nobody's business: host names, names of people, paths of homes, tokens."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from epfuse.doctor.finding import Finding

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
"""In the name of an environment variable whose value is nobody's business."""
SHORTEST_SECRET = 6
"""Characters; what is shorter is a switch."""
TOKENS = re.compile(
    r"\b(?:hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abpsr]-|nvapi-|AKIA)[A-Za-z0-9_\-]{8,}"
    r"|(?<=://)[^/\s@]+@"  # a URL's user and password
)
HOMES = re.compile(r"/(?:home|Users)/[^/\s:'\",;)]+|/root(?![\w.-])")
COMMON_USERS = {"root", "user", "ubuntu", "admin"}
ENDS = r"(?![A-Za-z0-9_])"


@dataclass(frozen=True)
class Redaction:
    """What to replace.

    Attributes:
        rules: pattern and what stands in its place, in their order.
    """

    rules: tuple[tuple[re.Pattern[str], str], ...]

    @classmethod
    def of_this_process(cls) -> Redaction:
        """This machine's, this user's and this environment's. Asks no name server."""
        secrets = [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST_SECRET]
        homes, user = [os.path.expanduser("~"), os.environ.get("HOME", "")], os.environ.get("USER", "")
        with suppress(KeyError):  # a container's user need have no entry
            entry = pwd.getpwuid(os.getuid())
            homes.append(entry.pw_dir)
            user = entry.pw_name
        homes += [os.path.realpath(home) for home in homes if home]
        homes = [home.rstrip("/") for home in homes if len(Path(home).parts) > 1]
        hosts = [socket.gethostname(), os.uname().nodename, os.environ.get("HOSTNAME", "")]
        hosts += [host.partition(".")[0] for host in hosts]
        rules = [(re.compile(_any(secrets)), "<secret>"), (TOKENS, "<secret>")]
        rules += [(re.compile(_any(homes) + ENDS), "~"), (HOMES, "~")]
        if user not in COMMON_USERS and user:
            rules.append((re.compile(rf"(?<=[/\-_.]){re.escape(user)}{ENDS}"), "<user>"))
        hosts = [host for host in hosts if host not in ("", "localhost")]
        rules.append((re.compile(rf"(?<![A-Za-z0-9_]){_any(hosts)}{ENDS}", re.IGNORECASE), "<host>"))
        return cls(tuple(rules))

    def text(self, text: str) -> str:
        """``text`` without them."""
        for pattern, instead in self.rules:
            text = pattern.sub(instead, text)
        return text

    def of(self, finding: Finding) -> Finding:
        """``finding`` without them."""
        fix = None if finding.fix is None else self.text(finding.fix)
        return finding.model_copy(update={"found": self.text(finding.found), "fix": fix})


def _any(words: Iterable[str]) -> str:
    """A pattern of any of them, the longest first; of nothing at all where there are none."""
    found = sorted({word for word in words if word}, key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, found))})" if found else r"(?!)"
