"""Hosts on one machine that can really be lost: each has a network, processes, a name, shared memory and a temporary folder of its own.

Linux namespaces joined by one veth pair; needs root, `ip`, `unshare` and `nsenter`. Disks are shared, as a cluster's file system is.
Losing a host kills every process in it at once, and its shared memory goes with them. Cutting it off loses packets silently: no
connection is closed.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SUBNET = "10.77.0"
START_SECONDS = 10.0
MOST_BURST_KB, BURST_KB_PER_MBIT = 256, 2.56
# The first process of a host: mounts what is private, then buries orphans until it is killed.
INIT = """
import ctypes, os, signal, subprocess, sys, time
name, temporary = sys.argv[1:]
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
for folder in ("/dev/shm", temporary):
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
subprocess.run(["hostname", name], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
print("ready", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.2)
"""


class Host:
    """One of them. `address` is reachable from the other."""

    def __init__(self, number: int, tag: str, folder: Path) -> None:
        self.name = f"h{number}"
        self.address = f"{SUBNET}.{10 + number}"
        self.interface = f"{tag}e{number}"
        self.namespace = f"{tag}h{number}"
        self.temporary = folder / f"tmp-{self.name}"
        self._holder: subprocess.Popen[str] | None = None
        self._init = 0

    def start(self) -> None:
        """Boots it; its network namespace and interface exist."""
        self.temporary.mkdir(parents=True, exist_ok=True)
        private = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc"]
        command = ["ip", "netns", "exec", self.namespace, *private, sys.executable, "-c", INIT, self.name, str(self.temporary)]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline().strip() != "ready":
            raise SystemExit(f"The host {self.name} did not start; namespaces need root.")
        deadline = time.monotonic() + START_SECONDS
        while not self._init and time.monotonic() < deadline:  # under `ip`, which became unshare, which forked
            self._init = next((pid for pid in all_processes() if parent_of(pid) == self._holder.pid), 0)

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a command inside; its output is appended to `log`."""
        enter = ["nsenter", "--target", str(self._init), "--mount", "--net", "--pid", "--uts", "--ipc", f"--wd={Path.cwd()}", "--"]
        own = {"TMPDIR": str(self.temporary), "GLOO_SOCKET_IFNAME": self.interface, "TP_SOCKET_IFNAME": self.interface}
        with log.open("ab") as out:
            return subprocess.Popen([*enter, *command], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment, **own})

    def processes(self, word: str = "") -> list[int]:
        """Its processes (numbers as this machine sees them) whose command line holds `word`."""
        mine = namespace_of(self._init)
        return [pid for pid in all_processes() if mine and namespace_of(pid) == mine and word in command_line(pid)]

    def lose(self) -> None:
        """The power goes: every process ends at once, shared memory and temporary folder are gone. `start` boots it anew."""
        if self._holder is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init, 9)
            self._holder.wait()
            self._holder, self._init = None, 0

    def link(self, up: bool) -> None:
        """Plugs its cable in or out."""
        subprocess.run(["ip", "-n", self.namespace, "link", "set", self.interface, "up" if up else "down"], check=True)

    def limit(self, rate: str) -> None:
        """What it sends leaves at this rate at most (such as `100mbit`) from now on. The queue holds a message: nothing is lost.

        The burst is 20 ms of a slow line: a longer one would give back what a pause between two exchanges cost.
        """
        burst = min(MOST_BURST_KB, round(float(rate.removesuffix("mbit")) * BURST_KB_PER_MBIT))
        shape = ["root", "tbf", "rate", rate, "burst", f"{burst}kb", "limit", "16mb"]
        run("ip", "netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev", self.interface, *shape)


@contextlib.contextmanager
def two_hosts(folder: Path, rate: str = "") -> Iterator[tuple[Host, Host]]:
    """Both running and joined; `rate` (such as `100mbit`) limits the link. `folder` is for their private temporary folders."""
    tag = f"m{os.getpid() % 100_000}"
    hosts = Host(0, tag, folder), Host(1, tag, folder)
    try:
        for host in hosts:
            run("ip", "netns", "add", host.namespace)
        run("ip", "link", "add", hosts[0].interface, "type", "veth", "peer", "name", hosts[1].interface)
        for host in hosts:
            run("ip", "link", "set", host.interface, "netns", host.namespace)
            run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            run("ip", "-n", host.namespace, "link", "set", host.interface, "up")
            network = [f"{SUBNET}.0/24", "dev", host.interface, "src", host.address]
            run("ip", "-n", host.namespace, "route", "replace", *network, "congctl", "cubic")  # the machine's default may differ
            if rate:
                host.limit(rate)
            host.start()
        yield hosts
    finally:
        for host in hosts:
            host.lose()
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False, stderr=subprocess.DEVNULL)


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}: {result.stderr.strip()}")


def all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def namespace_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
