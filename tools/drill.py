"""Breaks a live two-host training job in every way a cluster does, watches it go on, and prints what became of each fault.

    sudo python -m tools.drill --json benchmarks/drill.json

Two hosts (tools/hosts.py: own network, processes, shared memory; one shared disk) run the same torchrun command. For each fault the job is
started afresh, broken at a random step, and followed to its end. A fault is noticed when the first worker of a surviving host ends. What
the job resumed from is read in its own records; the steps it must resume at are those its hosts' memory or the folder held.

    host     every process of host 1 is killed, and its memory is gone
    link     packets between the hosts are lost silently: no connection closes
    frozen   one rank gets SIGSTOP
    worker   one rank gets SIGKILL
    meeting  host 0, where the ranks meet, is lost; then the same command is started on host 1 alone
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moetrain.checkpoint.source import DISK
from tools.hosts import Host, command_line, two_hosts
from tools.small_job import TOKENS_PER_STEP, small_job

WORKER = "launch/train.py"
NOTICED_SECONDS = 15.0
LIMIT_SECONDS = 300.0
PORT = 29_600
FAULTS = ("host", "link", "frozen", "worker", "meeting")
SMALL = (
    *small_job(width=64, seq_len=64), "telemetry.console=lines", "telemetry.experts_every=1", "checkpoint.every_steps=10",
    "checkpoint.snapshot_every=1",
)  # fmt: skip


MOST_STEPS = 4  # a copy is made when the one before it has arrived: with steps of a tenth of a second on two cores, every second or third


@dataclass
class Outcome:
    """What became of one fault. Seconds are counted from the fault."""

    fault: str
    step: int  # the last step trained before the fault
    noticed_seconds: float
    resumed_step: int
    bytes_read: dict[str, int]  # at the resume, by source, as the checkpoint itself counts them
    plt: float
    resumed_seconds: float
    ranks_after: int

    @property
    def ok(self) -> bool:
        """Noticed in time, and resumed from memory at the last step that was complete: no token lost, no object read."""
        return (
            self.noticed_seconds <= NOTICED_SECONDS
            and self.step - self.resumed_step <= MOST_STEPS
            and not self.plt
            and not self.bytes_read.get(DISK)
            and sum(self.bytes_read.values()) > 0
        )


class Job:
    """The same command on every host."""

    def __init__(self, folder: Path, overrides: list[str], steps: int) -> None:
        self.folder, self.run = folder, folder / "run"
        self.overrides = [*SMALL, *overrides, f"run.folder={folder}", "run.name=run", f"train.tokens={steps * TOKENS_PER_STEP}"]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, hosts: list[Host], endpoint: Host) -> None:
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        for host in hosts:
            meet = [f"--rdzv-endpoint={endpoint.address}:{PORT}", f"--local-addr={host.address}", "--rdzv-backend=c10d", "--rdzv-id=drill"]
            patience = "join_timeout=120,last_call_timeout=3,read_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=3"
            meet.append(f"--rdzv-conf=is_host={int(host is endpoint)},{patience}")
            command = [
                torchrun,
                "--nnodes=1:2",
                "--nproc-per-node=1",
                "--max-restarts=5",
                "--shutdown-timeout=5",
                *meet,
                WORKER,
                *self.overrides,
            ]
            environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
            self.processes.append(host.run(command, self.folder / f"{host.name}.log", environment))

    def records(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def last_step(self) -> int:
        return max((int(record["train/step"]) for record in self.records() if "train/loss" in record), default=0)

    def resumes(self) -> list[dict]:
        return [record for record in self.records() if record.get("event") == "resume"]

    def is_done(self) -> bool:
        return (self.run / "DONE").exists()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = LIMIT_SECONDS) -> float:
    """Seconds until it held. Raises TimeoutError."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"{what} did not come within {seconds:.0f} s.")
        time.sleep(0.02)
    return time.monotonic() - started


def break_it(fault: str, hosts: tuple[Host, Host]) -> list[Host]:
    """Injects the fault; the hosts whose workers must notice."""
    first, second = hosts
    if fault == "host":
        second.lose()
        return [first]
    if fault == "meeting":
        first.lose()
        return [second]
    if fault == "link":
        first.link(up=False)
        return [first, second]
    (worker,) = second.processes(WORKER)[-1:]
    os.kill(worker, signal.SIGSTOP if fault == "frozen" else signal.SIGKILL)
    return [first]


def workers(hosts: Sequence[Host]) -> set[int]:
    """Training processes, without the torchrun above them."""
    return {pid for host in hosts for pid in host.processes(WORKER) if "torchrun" not in command_line(pid)}


def drill(fault: str, folder: Path, options: argparse.Namespace, choose: random.Random) -> Outcome:
    """One job, one fault, to the end. Raises TimeoutError when it does not go on."""
    folder.mkdir(parents=True)
    with two_hosts(folder) as hosts:
        job = Job(folder, options.overrides, options.steps)
        job.start(list(hosts), hosts[0])
        at = choose.randint(options.steps // 4, options.steps // 2)
        wait_for(lambda: job.last_step() >= at, f"step {at}")
        before, seen = workers(hosts), len(job.resumes())
        begun = time.monotonic()
        survivors = break_it(fault, hosts)
        step = job.last_step()
        watched = before & workers(survivors)
        noticed = wait_for(lambda: any(not Path(f"/proc/{pid}").exists() for pid in watched), "the end of a worker", 60)
        if fault == "meeting":
            job.processes[1].wait(LIMIT_SECONDS)
            job.start([hosts[1]], hosts[1])
        wait_for(lambda: len(job.resumes()) > seen, "the resume")
        resumed_seconds = time.monotonic() - begun
        resumed = job.resumes()[-1]
        wait_for(job.is_done, "the end of the run")
        return Outcome(
            fault=fault,
            step=step,
            noticed_seconds=round(noticed, 1),
            resumed_step=int(resumed["train/step"]),
            bytes_read=json.loads(resumed["checkpoint/bytes_read"]),
            plt=float(resumed["checkpoint/plt_weights"]),
            resumed_seconds=round(resumed_seconds, 1),
            ranks_after=int(resumed["parallel/ranks"]),
        )


def table(outcomes: list[Outcome]) -> str:
    lines = [f"{'fault':8} {'noticed':>8} {'step':>5} {'resumed':>8} {'PLT':>6} {'went on after':>13} {'ranks':>5}  bytes read"]
    for o in outcomes:
        read = ", ".join(f"{count:,} from {source}" for source, count in o.bytes_read.items())
        begin = f"{o.fault:8} {o.noticed_seconds:6.1f} s {o.step:5} {o.resumed_step:8} {o.plt:6.2%}"
        lines.append(f"{begin} {o.resumed_seconds:11.1f} s {o.ranks_after:5}  {read}{'' if o.ok else '  FAILED'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=",".join(FAULTS), help="in this order (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80, help="length of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="disk that both hosts share (default: a new temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of launch/train.py")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="drill-"))).absolute()
    choose = random.Random(options.seed)
    outcomes: list[Outcome] = []
    for number, fault in enumerate(options.faults.split(",") * options.repeat):
        outcomes.append(drill(fault, folder / f"{number:02}-{fault}", options, choose))
        print(table(outcomes[-1:]), flush=True)
    print(f"\n{table(outcomes)}\nLogs and runs are in {folder}.")
    if options.json:
        result = {"command": "python -m tools.drill " + " ".join(sys.argv[1:]), "outcomes": [asdict(o) | {"ok": o.ok} for o in outcomes]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
