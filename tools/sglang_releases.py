"""Unpack the SGLang releases that the integration is tested with: ``python tools/sglang_releases.py DIRECTORY``.

With ``--record`` what epfuse uses of each is written to ``interfaces.json``, for a release that joins the tested ones.
All but their compiled extensions, which are not needed without a GPU. What is there already is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

from server_releases import Source

from epfuse.integrations.sglang.interfaces import SGLANG
from epfuse.integrations.sglang.releases import TESTED

SOURCE = Source(
    SGLANG,
    "sglang",
    TESTED,
    Path(__file__).with_name("sglang_releases.txt"),
    lambda name: not name.endswith(".so"),
)

if __name__ == "__main__":
    SOURCE.bring(Path(sys.argv[1]), record="--record" in sys.argv)
