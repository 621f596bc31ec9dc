"""A rank's side of the agent of its node: finding it, starting it, asking it. No torch."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Protocol

import moetrain
from moetrain.checkpoint.arena import arena_folder, spare_folders
from moetrain.checkpoint.config import AgentConfig
from moetrain.checkpoint.serve import PULSE, SOCKET, short_path
from moetrain.checkpoint.wire import answer, send

CALL_SECONDS = 60.0  # for everything but persisting
SILENCE_SECONDS = 2.0  # that training waits for an answer before it looks whether the agent still runs, and for a sign that it does
AGENT = "moetrain.checkpoint.serve"


class AgentDied(Exception):
    """The agent is gone, or does not answer."""


class AgentLate(AgentDied):
    """It did not answer in time. It may still do what it was asked for."""


class Link(Protocol):
    """One connection to an agent. Used by one thread at a time."""

    def call(self, request: dict, limit_seconds: float, silence_seconds: float = inf) -> dict:
        """`silence_seconds`: how long the agent may neither answer nor show that it is working on it.

        Raises OSError, of which TimeoutError after either limit; Refused with its sentence.
        """
        ...

    def close(self) -> None: ...


class Connect(Protocol):
    """The way to the agent of this node. `folder`: its arena; `spare`: where slots lie that find no room there."""

    folder: Path
    spare: list[Path]

    def __call__(self, start: bool) -> Link | None:
        """A new connection. `start`: the agent is started when there is none; otherwise None then. Raises AgentDied."""
        ...

    def is_gone(self) -> bool:
        """Whether there is no agent, not even one that hangs. Never waits."""
        ...


class SocketLink:
    """A connection to the agent's process."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError when nobody listens there, TimeoutError when nobody has picked up the calls of many others."""
        self._folder = folder
        self._socket = _connected(folder / SOCKET)

    def call(self, request: dict, limit_seconds: float, silence_seconds: float = inf) -> dict:
        silence, waited = min(silence_seconds, limit_seconds), 0.0
        self._socket.settimeout(silence)
        send(self._socket, request)
        while not self._is_answered():
            waited += silence
            if waited >= limit_seconds:
                raise TimeoutError
            self._feel_pulse(silence)
        self._socket.settimeout(limit_seconds)
        return answer(self._socket)[0]

    def _is_answered(self) -> bool:
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return False
        return True

    def _feel_pulse(self, limit_seconds: float) -> None:
        """A large copy takes its time, and an agent at work hangs up at once; one that was stopped does not."""
        with _connected(self._folder / PULSE) as probe:
            probe.settimeout(limit_seconds)
            probe.recv(1)

    def close(self) -> None:
        self._socket.close()


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    patience = struct.pack("@ll", int(SILENCE_SECONDS), int(SILENCE_SECONDS % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)  # else it waits for ever in a queue that is full
    try:
        with short_path(path) as name:
            connection.connect(name)
    except OSError as error:
        connection.close()
        raise TimeoutError if isinstance(error, BlockingIOError) else error from None
    return connection


class Launcher:
    """Connects to the agent of this node for one run, and starts it."""

    def __init__(self, checkpoint: Path, config: AgentConfig, environ: Mapping[str, str] = os.environ) -> None:
        """`checkpoint`: the absolute checkpoint folder."""
        self.folder = arena_folder(checkpoint, config.folder)
        self.spare = spare_folders(self.folder, config.folder)
        self._config, self._environ = config, environ

    def __call__(self, start: bool) -> SocketLink | None:
        """Any rank of the node may start it: local rank 0 at once, the others when it has not come up after half of the deadline.

        Raises TimeoutError when there is one that lets nobody in.
        """
        if (link := self._link()) is not None:
            return link
        if not start and not (self.folder / "generations").is_dir():
            return None
        begin = time.monotonic()
        patience = 0.0 if self._environ.get("LOCAL_RANK", "0") == "0" else self._config.deadline_seconds / 2
        started = False
        while time.monotonic() < begin + self._config.deadline_seconds:
            if not started and time.monotonic() >= begin + patience:
                self._start()
                started = True
            if (link := self._link()) is not None:
                return link
            time.sleep(0.02)
        raise AgentDied(f"the agent of this node did not answer within {self._config.deadline_seconds:g} s ({self.folder})")

    def is_gone(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                with short_path(self.folder / PULSE) as name:
                    probe.connect(name)
            except BlockingIOError:  # many others wait there
                return False
            except OSError:
                return True
        return False

    def _link(self) -> SocketLink | None:
        try:
            return SocketLink(self.folder)
        except TimeoutError:
            raise
        except OSError:
            return None

    def _start(self) -> None:
        package = str(Path(moetrain.__file__).parents[1])  # importable whatever the working folder is now
        path = os.pathsep.join(filter(None, [package, self._environ.get("PYTHONPATH")]))
        about = {
            "folder": str(self.folder),
            "spare": [str(folder) for folder in self.spare],
            "host": own_address(self._environ),
            "linger_seconds": self._config.linger_seconds,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", AGENT, json.dumps(about)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=dict(self._environ) | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):  # it comes back as soon as the agent is on its own
            process.wait(self._config.deadline_seconds)


def own_address(environ: Mapping[str, str]) -> str:
    """The address by which other nodes of the job reach this one: that of the way to the job's host. This node alone: 127.0.0.1."""
    if environ.get("LOCAL_WORLD_SIZE", "1") == environ.get("WORLD_SIZE", "1") or "MASTER_ADDR" not in environ:
        return "127.0.0.1"
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((environ["MASTER_ADDR"], int(environ.get("MASTER_PORT", "1"))))  # sends nothing
        return probe.getsockname()[0]
    return "127.0.0.1"
