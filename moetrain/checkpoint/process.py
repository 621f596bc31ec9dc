"""The trainer's side of its writer process: start, hand over one job, wait for its answer, end. No torch."""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import moetrain
from moetrain.checkpoint.job import Reply, SaveJob
from moetrain.checkpoint.writer import receive, send


class WriterDied(Exception):
    """The writer process ended before it answered."""


class Writer(Protocol):
    """Takes a save from a filled arena to its outcome."""

    def run(self, job: SaveJob, arena: int, limit_seconds: float) -> Reply:
        """Waits; the arena (a descriptor) must not change before this returns. Raises WriterDied."""
        ...

    def stop(self, wait_seconds: float = 10.0) -> str:
        """Ends it after its present job. Returns how it ended."""
        ...


class WriterProcess:
    """One writer, started at the first job and again after it died. Used by one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def run(self, job: SaveJob, arena: int, limit_seconds: float) -> Reply:
        """Hands over the job and the arena's descriptor and waits; the arena must not change before this returns.

        Raises WriterDied; a writer that takes longer than the limit, as on a disk that hangs, is killed.
        """
        connection = self._connection or self._start()
        connection.settimeout(limit_seconds)
        try:
            send(connection, job.to_bytes(), arena)
            message = receive(connection)
        except TimeoutError:
            raise WriterDied(f"the writer process took more than {limit_seconds:g} s and was stopped ({self.stop(0)})") from None
        except OSError:
            message = None
        if message is None:
            raise WriterDied(f"the writer process ended ({self.stop()})")
        return Reply.from_bytes(message[0])

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        package = str(Path(moetrain.__file__).parents[1])  # importable whatever the working folder is now
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "moetrain.checkpoint.writer", str(theirs.fileno()), str(os.getpid())]
        environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        self._connection = ours
        return ours

    def stop(self, wait_seconds: float = 10.0) -> str:
        """Ends the process after its present job, killing it when that takes too long. Returns how it ended."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is None:
            return "not started"
        process, self._process = self._process, None
        with suppress(subprocess.TimeoutExpired):
            return f"exit code {process.wait(wait_seconds)}"
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process inside a hanging disk cannot even be killed
            process.wait(1.0)
        return "killed"
