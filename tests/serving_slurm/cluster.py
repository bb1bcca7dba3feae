"""A Slurm of one node on loopback, in a folder of its own: started, hurt and removed by a test."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).parent
# daemons are not in everybody's PATH; they lie beside the commands
SBIN = str(Path(shutil.which("sbatch") or "sbatch").resolve().parents[1] / "sbin")
DAEMONS = ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged")

# Stands before Slurm's own sbatch in PATH: notes each call, and may answer late, or falsely, after it has submitted.
SBATCH = """#!/bin/bash
key=
for word in "$@"; do case $word in --comment=*) key=${word#--comment=};; esac; done
printf '%s\\n' "$key" >> '@DIR@/sbatch.calls'
how=$(cat '@DIR@/sbatch.how' 2>/dev/null)
if [ "$how" = late ]; then
    '@SBATCH@' "$@" >/dev/null
    sleep 1
    echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2
    exit 1
fi
exec '@SBATCH@' "$@"
"""


def missing(accounting: bool = False) -> str | None:
    """A program that this needs and that is not installed."""
    names = ["slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol"]
    names += ["slurmdbd", "mariadbd", "mariadb-install-db", "mariadb"] if accounting else []
    return next((name for name in names if _which(name) is None), None)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Cluster:
    """The daemons of one cluster.

    Attributes:
        folder: everything of it.
        accounting: whether slurmdbd and its database run too.
        environment: in which sbatch and the others find it.
    """

    def __init__(self, folder: Path, accounting: bool = False) -> None:
        self.folder = folder
        self.accounting = accounting
        for name in ("run", "state", "spool", "log", "bin"):
            (folder / name).mkdir(parents=True)
            (folder / name).chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        values = {
            "DIR": str(folder),
            "USER": getpass.getuser(),
            "CTLD_PORT": str(free_port()),
            "SLURMD_PORT": str(free_port()),
            "DBD_PORT": str(free_port()),
            "SQL_PORT": str(free_port()),
            "SBATCH": str(_which("sbatch")),
        }
        self.sql_port, self.dbd_port = values["SQL_PORT"], int(values["DBD_PORT"])
        values["ACCOUNTING"] = (
            "AccountingStorageType=accounting_storage/slurmdbd\n"
            f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={values['DBD_PORT']}\n"
            f"AccountingStoragePass={folder}/run/munge.sock"  # not a password, with munge
            if accounting
            else "AccountingStorageType=accounting_storage/none"
        )
        for name, text in (
            ("slurm.conf", (HERE / "slurm.conf.in").read_text()),
            ("slurmdbd.conf", (HERE / "slurmdbd.conf.in").read_text()),
            ("bin/sbatch", SBATCH),
        ):
            for key, value in values.items():
                text = text.replace(f"@{key}@", value)
            (folder / name).write_text(text)
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "bin" / "sbatch").chmod(0o755)
        self.environment = dict(os.environ)
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}:{SBIN}"

    def __enter__(self) -> Cluster:
        try:
            self.start("munged")
            if self.accounting:
                self._start_database()
                self.start("slurmdbd")
                self._until(self._database_answers, "slurmdbd")
            self.start("slurmctld")
            self.start("slurmd")
            self._until(self.up, "slurmctld")
            self._until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%t"), "slurmd")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, daemon: str) -> None:
        """Start a daemon that does not run; it detaches itself."""
        run, log = self.folder / "run", self.folder / "log"
        argv = {
            "munged": [
                "--force",
                f"--key-file={self.folder / 'munge.key'}",
                f"--socket={run / 'munge.sock'}",
                f"--pid-file={run / 'munged.pid'}",
                f"--log-file={log / 'munged.log'}",
                f"--seed-file={run / 'munged.seed'}",
            ],
            "slurmctld": ["-f", str(self.folder / "slurm.conf")],
            "slurmd": ["-f", str(self.folder / "slurm.conf"), "-N", "localhost"],
            "slurmdbd": [],
        }[daemon]
        for left in (run / f"{daemon}.pid", *run.glob("munge.sock*" if daemon == "munged" else "-")):
            left.unlink(missing_ok=True)
        program = _which(daemon)
        assert program is not None
        subprocess.run([program, *argv], env=self.environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
        self._until(lambda: self.pid(daemon) is not None, daemon)

    def pid(self, daemon: str) -> int | None:
        """Of a daemon that runs."""
        with suppress(OSError, ValueError):
            pid = int((self.folder / "run" / f"{daemon}.pid").read_text())
            # the number may be another's by now
            if daemon in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                return pid
        return None

    def hurt(self, daemon: str, number: signal.Signals) -> None:
        """Send a daemon a signal; after one that ends it, it is gone when this returns."""
        pid = self.pid(daemon)
        if pid is None:
            return
        os.kill(pid, number)
        if number in (signal.SIGTERM, signal.SIGKILL):
            self._until(lambda: not _runs(pid), f"the end of {daemon}")

    def restart(self, daemon: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End a daemon and start it again."""
        self.hurt(daemon, number)
        self.start(daemon)

    def up(self) -> bool:
        return "is UP" in self.ask("scontrol", "ping")

    def ask(self, *argv: str) -> str:
        """What a command says; nothing if it fails."""
        with suppress(subprocess.TimeoutExpired):
            return subprocess.run(
                argv, env=self.environment, capture_output=True, text=True, timeout=30, check=False
            ).stdout
        return ""

    def jobs(self, name: str) -> list[tuple[str, str]]:
        """Number and state of the jobs of this name, ended ones too."""
        lines = self.ask("squeue", "-h", "-a", "-t", "all", f"--name={name}", "-o", "%i %T").splitlines()
        return [(number, state) for number, state in (line.split() for line in lines)]

    def calls(self) -> list[str]:
        """The key of each call of sbatch."""
        calls = self.folder / "sbatch.calls"
        return calls.read_text().split() if calls.exists() else []

    @contextmanager
    def operator(self) -> Iterator[None]:
        """Somebody who brings the node back: one with a job that the controller does not know is drained."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                if self.up():
                    self.ask("scontrol", "update", "nodename=localhost", "state=resume")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def stop(self) -> None:
        """End every daemon and every job of the cluster, whatever state they are in."""
        with suppress(ProcessLookupError):
            for daemon in DAEMONS:
                if (pid := self.pid(daemon)) is not None:
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGKILL)
        for pid in _processes_of(self.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start_database(self) -> None:
        data = self.folder / "sql"
        user = getpass.getuser()
        install, server = _which("mariadb-install-db"), _which("mariadbd")
        assert install is not None
        assert server is not None
        common = ["--no-defaults", f"--user={user}", f"--datadir={data}"]
        subprocess.run(
            [install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
        )
        sock = self.folder / "run" / "sql.sock"
        with (self.folder / "log" / "mariadbd.log").open("wb") as log:
            subprocess.Popen(
                [
                    server,
                    *common,
                    f"--socket={sock}",
                    f"--port={self.sql_port}",
                    "--bind-address=127.0.0.1",
                    f"--pid-file={self.folder / 'run' / 'mariadbd.pid'}",
                    "--innodb-buffer-pool-size=64M",
                    "--innodb-lock-wait-timeout=900",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._until(lambda: self.pid("mariadbd") is not None and sock.exists(), "mariadbd")
        words = (
            "create database slurm_acct; create user slurm@localhost identified by 'slurm'; "
            "create user slurm@'127.0.0.1' identified by 'slurm'; "
            "grant all on slurm_acct.* to slurm@localhost; grant all on slurm_acct.* to slurm@'127.0.0.1';"
        )
        client = _which("mariadb")
        assert client is not None
        subprocess.run([client, "--no-defaults", f"--socket={sock}", "-uroot", "-e", words], check=True, timeout=60)

    def _database_answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.dbd_port), timeout=1):
            return True
        return False

    def _until(self, true: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                logs = "\n".join(_tail(log) for log in sorted((self.folder / "log").glob("*.log")))
                raise AssertionError(f"waited {seconds:.0f} s for {what}\n{logs}")
            time.sleep(0.05)


def _tail(log: Path) -> str:
    return f"{log.name}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-10:])


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _processes_of(folder: Path) -> Sequence[int]:
    """Who names a folder in the command line or has its cluster in the environment: jobs and what starts them."""
    found = []
    marks = (str(folder).encode(), f"SLURM_CONF={folder}".encode())
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with suppress(OSError):
                if marks[0] in (process / "cmdline").read_bytes() or marks[1] in (process / "environ").read_bytes():
                    found.append(int(process.name))
    return found
