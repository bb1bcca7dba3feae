"""A job that measures nothing: claims its point as the real one does, waits, writes its end.

``python stub_job.py POINT_FOLDER --key KEY``; what it does comes from ``stub.json`` beside the points: ``seconds``,
``state``, ``reason``, ``die`` (points that end without an end in their first attempt). Each start, claim and end is a
line of ``stub.log`` there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from epfuse.serving.claim import Claim, Revoked
from epfuse.serving.done import Done, End
from epfuse.serving.layout import PointFolder


def say(point: Path, *words: str) -> None:
    log = os.open(point.parent / "stub.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(log, (" ".join((*words, point.name)) + "\n").encode())
    os.close(log)


def events(points: Path) -> list[tuple[str, str, str]]:
    """What the jobs of a run have done: (event, key, point)."""
    log = points / "stub.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(event, key, point) for event, key, point in (line.split() for line in lines)]


def main() -> None:
    point, key = Path(sys.argv[1]), sys.argv[3]
    how = json.loads((point.parent / "stub.json").read_text()) if (point.parent / "stub.json").exists() else {}
    say(point, "start", key)
    started = time.time()
    if PointFolder(point).done.exists() or (claim := Claim.take(point, key)) is None:
        say(point, "second", key)
        return
    say(point, "claim", key)
    claim.note("running")
    if point.name in how.get("die", ()) and key.endswith("-1"):
        print("killed by the test")
        os._exit(1)
    time.sleep(how.get("seconds", 0.2))
    state = how.get("states", {}).get(point.name, "done")
    done = Done(
        name=point.name, key=key, state=End(state), reason=how.get("reason", ""), started=started, ended=time.time()
    )
    try:
        claim.publish(done.model_dump_json(by_alias=True).encode(), PointFolder(point).done)
    except Revoked:
        say(point, "revoked", key)
    else:
        say(point, "end", key)


if __name__ == "__main__":
    main()
