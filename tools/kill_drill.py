"""Kills one worker of a live training job with SIGKILL at random moments, starts the same command again, and checks that nothing is lost.

    python tools/kill_drill.py --kills 20 --json benchmarks/kill_drill.json -- +experiment=gpt_moe_8e train.tokens=200000 ...

Before every restart the newest committed step is read from the run folder by the checkpoint reader (without torch); the restarted job
must resume exactly there. Ranks alternate between 2 and 1 as --ranks says. The last start is not killed: it runs to its end, which
--last can bring nearer (a long job is killed, a short rest is waited for).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder


@dataclass
class Kill:
    """One kill and what came of it."""

    ranks: int
    after_seconds: float
    committed_step: int | None  # newest in the folder after the kill
    resumed_step: int | None = None  # where the next start that began to train went on; None: from scratch
    is_followed: bool = False  # by such a start


def newest_step(folder: Path) -> int | None:
    """The step of the newest committed recovery point."""
    checkpoint = CheckpointFolder(folder / "checkpoint", Io())
    saves = checkpoint.saves()
    return checkpoint.manifest(saves[0]).step if saves else None


def command(ranks: int, overrides: list[str]) -> list[str]:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    return [torchrun, "--standalone", f"--nproc-per-node={ranks}", "launch/train.py", *overrides]


def children(pid: int) -> list[int]:
    """Direct children of a process, from /proc."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(process.name))
    return found


def workers(torchrun: int) -> list[int]:
    """The training processes under a torchrun."""
    return [pid for pid in children(torchrun) if b"launch/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def start(ranks: int, overrides: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(command(ranks, overrides), stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_one(job: subprocess.Popen[bytes], after: float, choose: random.Random) -> bool:
    """SIGKILL to one worker `after` seconds from now; False when the job ended by itself before. Waits for torchrun's end."""
    try:
        job.wait(after)
        return False
    except subprocess.TimeoutExpired:
        pass
    targets = workers(job.pid)
    while not targets and job.poll() is None:  # torchrun is still starting
        time.sleep(0.05)
        targets = workers(job.pid)
    if targets:
        os.kill(choose.choice(targets), signal.SIGKILL)
    job.wait(120)
    return True


def starts(folder: Path) -> list[int | None]:
    """Steps at which the job's starts went on, from metrics.jsonl; None: from scratch."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [
        record["train/step"] if record["event"] == "resume" else None for record in records if record.get("event") in ("start", "resume")
    ]


def note(kills: list[Kill], began: list[int | None]) -> None:
    """A start began to train: it is what followed every kill that none had followed yet."""
    for kill in kills:
        if began and not kill.is_followed:
            kill.resumed_step, kill.is_followed = began[0], True


def drill(options: argparse.Namespace, folder: Path) -> list[Kill]:
    choose = random.Random(options.seed)
    ranks = [int(number) for number in options.ranks.split(",")]
    kills: list[Kill] = []
    while len(kills) < options.kills:
        on = ranks[len(kills) % len(ranks)]
        after = choose.uniform(options.earliest, options.latest)
        job = start(on, options.overrides, options.log)
        seen = len(starts(folder))
        if not kill_one(job, after, choose):
            raise SystemExit(f"The job ended with code {job.returncode} before the kill: give it more train.tokens. See {options.log}.")
        kill = Kill(on, round(after, 2), newest_step(folder))
        began = starts(folder)[seen:]
        kills.append(kill)
        note(kills[:-1], began)
        went_on = f"this start had begun at {began[0] or 0}" if began else "this start had not begun to train"
        print(f"kill {len(kills):2}: {on} ranks, after {after:5.1f} s, committed step {kill.committed_step}, {went_on}", flush=True)
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", default="2,2,1", help="ranks of successive starts, in turn")
    parser.add_argument("--earliest", type=float, default=8.0, help="seconds after the start of torchrun")
    parser.add_argument("--latest", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="the run folder that the overrides name (run.folder/run.name)")
    parser.add_argument("--log", type=Path, default=Path("kill_drill.log"))
    parser.add_argument(
        "--last", action="append", default=[], metavar="OVERRIDE", help="added at the last start, such as train.tokens=800000"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="+", help="of launch/train.py")
    options = parser.parse_args()
    kills = drill(options, options.folder)
    seen = len(starts(options.folder))
    code = start(2, [*options.overrides, *options.last], options.log).wait()
    note(kills, starts(options.folder)[seen:])
    done = newest_step(options.folder)
    wrong = [kill for kill in kills if not kill.is_followed or kill.resumed_step != kill.committed_step]
    ok = code == 0 and not wrong
    print(f"{len(kills)} kills, after {len(wrong)} of which training did not go on at the last commit.")
    print(f"The last start ended with code {code} at step {done}: {'ok' if ok else 'FAILED'}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": ["python", "tools/kill_drill.py", *sys.argv[1:]],
            "ok": ok,
            "final_step": done,
            "kills": [asdict(kill) for kill in kills],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
