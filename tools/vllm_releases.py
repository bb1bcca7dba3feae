"""Unpack the vLLM releases that the integration is tested with: ``python tools/vllm_releases.py DIRECTORY``.

With ``--record`` what epfuse uses of each is written to ``interfaces.json``, for a release that joins the tested ones.
Only their Python code and metadata, as they are in the wheels; the compiled operators are not needed without a GPU.
What is there already is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

from server_releases import Source

from epfuse.integrations.vllm.interfaces import VLLM
from epfuse.integrations.vllm.releases import TESTED

SOURCE = Source(
    VLLM,
    "vllm",
    TESTED,
    Path(__file__).with_name("vllm_releases.txt"),
    lambda name: name.endswith((".py", ".json")) or ".dist-info/" in name,
)

if __name__ == "__main__":
    SOURCE.bring(Path(sys.argv[1]), record="--record" in sys.argv)
