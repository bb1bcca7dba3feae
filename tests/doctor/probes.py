"""Checks that go wrong in every way, run in the doctor's child."""

from __future__ import annotations

import os
import signal
import time

from epfuse.doctor.finding import Answer, bad, good


def fine() -> Answer:
    print("what libraries print")
    return good("fine")


def hangs() -> Answer:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
    return good("never")


def raises() -> Answer:
    raise RuntimeError("the driver\nsays no")


def is_bad() -> Answer:
    return bad("bad", "mend it")


def dies() -> Answer:
    os.kill(os.getpid(), signal.SIGSEGV)
    return good("never")


def ends() -> Answer:
    os._exit(3)


def needs_a_package() -> Answer:
    import epfuse_has_no_such_package  # noqa: F401

    return good("never")


def tells_all() -> Answer:
    return bad("\n".join(os.environ[name] for name in ("TOLD", "HF_TOKEN")), os.environ["TOLD"])
