"""The agent as a process: its sockets, one thread for each connection, and its end. Imports no torch.

`python -m moetrain.checkpoint.serve` with one JSON argument; it comes back at once, the agent goes on in a session of its own.
"""

import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from moetrain.base.clock import Clock, SystemClock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.agent import Agent, Alive, Answer, Session
from moetrain.checkpoint.arena import SLOTS, Arena, own_folder
from moetrain.checkpoint.wire import Address, WireError, fresh_room, receive, send
from moetrain.store.io import Io
from moetrain.store.objects import Superseded

ABOUT, SOCKET = "agent.json", "socket"
PULSE = "pulse"  # a socket where everybody who calls is hung up on: a sign of life, whatever requests are being worked on
MESSAGE_SECONDS = 30.0  # for one message once it has begun
LOOK_SECONDS = 0.2  # how often an agent asks itself whether it is over
GRACE_SECONDS = 20.0  # before the first rank comes

Operation = Callable[[Session, dict, memoryview], Answer]


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """The same place with fewer than the 108 bytes that a Unix socket's name may have."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def lock(folder: Path) -> int | None:
    """Makes the folder and owns it as long as the descriptor is open; None when another process does."""
    while True:
        own_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.sameopenfile(descriptor, other := os.open(folder, os.O_RDONLY)):
                os.close(other)
                return descriptor
            os.close(other)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:  # an agent that ended has just removed it
            pass
        os.close(descriptor)


class Server:
    """The sockets of one agent. `serve` returns when it is over."""

    def __init__(self, agent: Agent, host: str, linger_seconds: float, clock: Clock) -> None:
        """Raises OSError."""
        self.agent, self._linger, self._clock = agent, linger_seconds, clock
        self._local, self._pulse = _listening(agent.folder / SOCKET), _listening(agent.folder / PULSE)
        before = _about(agent.folder)
        self._remote = _bound(host, before["port"] if before else 0)
        token = before["token"] if before else secrets.token_hex(16)
        agent.address = Address(host, self._remote.getsockname()[1], token)
        spare = [slots.parent for slots in agent.arena.folders if slots.parent != agent.folder]
        about = {"pid": os.getpid(), "linger_seconds": linger_seconds}
        for one in spare:
            _tell(one, about)
        _tell(agent.folder, vars(agent.address) | about | {"spare": [str(one) for one in spare]})

    def serve(self) -> None:
        quiet_since, limit = self._clock.monotonic(), max(GRACE_SECONDS, self._linger)
        rescuing: Thread | None = None  # nobody came back
        while not (self.agent.is_stopped and not self.agent.num_persisting):
            self._show_life()
            for listener in select.select([self._local, self._remote, self._pulse], [], [], LOOK_SECONDS)[0]:
                connection, _ = listener.accept()
                if listener is self._pulse:
                    connection.close()
                    continue
                session = self.agent.open(lambda: True, listener is self._local)  # now: whoever was let in keeps the agent from ending
                Thread(target=self._attend, args=(connection, session), daemon=True).start()
                limit = self._linger
            now = self._clock.monotonic()
            if any(session.is_local for session in tuple(self.agent.sessions)):  # others come and go
                quiet_since, rescuing = now, None
            elif rescuing is not None:
                if not rescuing.is_alive():
                    return
            elif self.agent.num_persisting:
                quiet_since = now
            elif self.agent.has_taken_leave:
                return
            elif now - quiet_since > limit:
                rescuing = Thread(target=self.agent.rescue, daemon=True)
                rescuing.start()

    def _show_life(self) -> None:
        """How long an agent has been dead is told by the age of its folders."""
        for slots in self.agent.arena.folders:
            with suppress(OSError):
                os.utime(slots.parent)

    def close(self) -> None:
        for listener in (self._local, self._remote, self._pulse):
            listener.close()

    def _attend(self, connection: socket.socket, session: Session) -> None:
        try:
            with connection, _death_of(connection if session.is_local else None) as death:
                session.alive = _alive(death)
                connection.settimeout(MESSAGE_SECONDS)
                while self._one(connection, session, death):
                    pass
        except (OSError, ValueError, KeyError, CheckpointError):  # gone, or it speaks another language
            pass
        finally:
            self.agent.close(session)

    def _one(self, connection: socket.socket, session: Session, death: int | None) -> bool:
        """Waits for one request and answers it; whether more may come."""
        waiting: list[socket.socket | int] = [connection] if death is None else [connection, death]
        if connection not in select.select(waiting, [], [])[0]:  # a forked child of a dead rank may hold the connection open
            return False
        message = receive(connection, self._room(session))
        if message is None:
            return False
        header, raw = message
        operations = self.agent.for_ranks if session.is_local else self.agent.for_agents
        if not session.is_local and (self.agent.address is None or not self.agent.address.admits(header)):
            return False
        send(connection, *answer_of(operations[header["op"]], session, header, raw))
        return True

    def _room(self, session: Session) -> Callable[[dict, int], memoryview]:
        def room(header: dict, num_bytes: int) -> memoryview:
            if session.is_local or header.get("op") != "put":
                return fresh_room(header, 0)
            if self.agent.address is None or not self.agent.address.admits(header):
                raise WireError("an unknown sender.")
            return self.agent.room_for_copy(session, header, num_bytes)

        return room


def answer_of(operation: Operation, session: Session, header: dict, raw: memoryview) -> Answer:
    try:
        return operation(session, header, raw)
    except Superseded as error:
        return {"superseded": error.message}, b""
    except CheckpointError as error:
        return {"error": error.message}, b""
    except WireError as error:
        return {"error": str(error)}, b""
    except OSError as error:
        return {"error": f"{error.filename or 'the arena'} cannot be used: {error.strerror}."}, b""


def _listening(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    with short_path(path) as name:
        listener.bind(name)
    listener.listen(128)
    return listener


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        if not port:
            raise
        listener.bind((host, 0))  # somebody has the port of the agent before this one
    listener.listen(128)
    return listener


@contextmanager
def _death_of(connection: socket.socket | None) -> Iterator[int | None]:
    """A descriptor that can be read when the process at the other end of a Unix socket is dead."""
    if connection is None:
        yield None
        return
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # dead already, or in another container
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _alive(death: int | None) -> Alive:
    return lambda: death is None or not select.select([death], [], [], 0)[0]


def _about(folder: Path) -> dict | None:
    try:
        return json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return None


def _tell(folder: Path, about: dict) -> None:
    draft = own_folder(folder) / f".{ABOUT}"
    draft.write_text(json.dumps(about))
    draft.rename(folder / ABOUT)


def remove_stale(base: Path, own: Path) -> None:
    """Arenas of this user whose agents were killed longer ago than they would have waited for ranks."""
    for folder in base.glob(f"moetrain-{os.getuid()}-*"):
        about = _about(folder)
        with suppress(OSError):
            age = time.time() - folder.stat().st_mtime
            if folder != own and age >= (about["linger_seconds"] if about else GRACE_SECONDS):
                clear(folder)


def clear(folder: Path) -> bool:
    """Removes the arena of an agent that was killed, its spare folders too; False when there is none, or its agent lives."""
    if not folder.is_dir() or (held := _try_lock(folder)) is None:
        return False
    for one in (*(_about(folder) or {}).get("spare", []), folder):
        shutil.rmtree(one, ignore_errors=True)
    os.close(held)
    return True


def _try_lock(folder: Path) -> int | None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def run(folder: Path, spare: Sequence[Path], host: str, linger_seconds: float) -> None:
    """The life of one agent. Returns at once when another one has the folder."""
    if lock(folder) is None:
        return
    clock = SystemClock()
    spare = list(owned(spare, clock))
    for base in (folder.parent, *(one.parent for one in spare)):
        remove_stale(base, base / folder.name)
    arena = Arena([folder / SLOTS, *(one / SLOTS for one in spare)])
    agent = Agent(folder, arena, Io(), clock)
    server = Server(agent, host, linger_seconds, clock)
    try:
        server.serve()
    finally:
        for one in (*spare, folder):
            shutil.rmtree(one, ignore_errors=True)
        server.close()


def owned(spare: Sequence[Path], clock: Clock) -> dict[Path, int]:
    """The spare folders that can be had, locked like the first one, so that no other agent takes them for a dead one's."""
    had, deadline = {}, clock.monotonic() + GRACE_SECONDS
    for folder in spare:
        with suppress(OSError, CheckpointError):  # the arena is smaller without it
            while (held := lock(folder)) is None and clock.monotonic() < deadline:  # by one that ends, or removes what was left there
                clock.sleep(LOOK_SECONDS)
            if held is not None:
                had[folder] = held
    return had


def main(argument: str) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # ranks decide when to stop; `moetrain checkpoint agent stop` ends an agent
    about = json.loads(argument)
    if os.fork():
        return 0
    run(Path(about["folder"]), [Path(one) for one in about["spare"]], about["host"], about["linger_seconds"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
