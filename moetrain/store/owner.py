"""Who has claimed a checkpoint folder, and whether that process is known to have ended. Where in doubt it has not. No torch."""

import os
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Owner:
    """What a claim says. A process number means something in one pid namespace between two boots only, and is used again there:
    `started`, in clock ticks since the boot, tells two processes apart. The last three are "" where they could not be read and in
    claims of older versions.
    """

    host: str
    pid: int
    time: float
    token: str = ""
    boot: str = ""
    namespace: str = ""
    started: str = ""

    @classmethod
    def of_this_process(cls, now: float) -> "Owner":
        boot = _read(PROC / "sys/kernel/random/boot_id")
        return cls(socket.gethostname(), os.getpid(), now, secrets.token_hex(8), boot, _namespace(), _start_of(os.getpid()))

    def to_json(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return f"Process {self.pid} on {self.host}"

    def is_known_not_to_write(self) -> bool:
        """It has ended, or is this process. Nothing is known of another machine, another container, or before a boot: a name of a host
        may be that of several machines."""
        me = Owner.of_this_process(self.time)
        if "" in (self.boot, self.namespace, self.started) or (self.boot, self.namespace) != (me.boot, me.namespace):
            return False
        return self.pid == me.pid or not _is_alive(self.pid, self.started)


def are_two(token: str, other: str) -> bool:
    """Whether these are known to be tokens of two claims; "" may be any."""
    return "" not in (token, other) and token != other


def _is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user, whose processes /proc may hide
    return _start_of(pid) in ("", started)


def _namespace() -> str:
    """As the kernel names it; "" where /proc shows the processes of another one, too."""
    try:
        return os.readlink(PROC / "self/ns/pid") if os.readlink(PROC / "self") == str(os.getpid()) else ""
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    fields = _read(PROC / str(pid) / "stat").rpartition(")")[2].split()  # the name before it may hold anything
    return fields[19] if fields else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
