"""How much of expert parallelism's communication hides: ScMoE beside its honest opponents, on a real link between two hosts.

    sudo python -m tools.bench_overlap opponents --point 60 --json benchmarks/overlap.json

Two hosts (tools/hosts.py) with one rank and one core each are joined by a link of limited rate. The unit is forward and backward of the
block pairs, without gradient reduction. Arms are interleaved: S serial exchange, O overlapped, N a local copy instead of the exchange,
C the exchange only. Before anything is timed, output and gradients are held against float64 in one process, and gradients of all schedules
with the same number of chunks must be equal to the bit. tools/overlap_cases.py says what the groups and points are.

    opponents   top-2 serial and in chunks, top-1, shared expert serial and overlapped, ScMoE Pos-2
    core        fewer of them, for a point whose laps are long
    hiding      ScMoE alone, many rounds: what of its exchanges hides, forward and backward, beside what could
    share       which part of top-2's MoE time is exchange
    window      how many times as long as their window ScMoE's exchanges are
    positions   the three positions of the shortcut
    schedules   every slot of ScMoE Pos-2, in 1, 2 and 4 chunks; what chunks gain where the exchanges outlast the window
    peers       DeepSpeed's MoE layer with our transport and its own (left out when it is not installed)
    transport   all-to-alls alone
    null        the block pairs without any exchange: by the plain path, and with all the code around exchanges (give --point unlimited)
    adaptive    the schedule that the planner chooses beside every other, at several sizes
    steps       whole training steps by the engine, gradient reduction and update included
    change      a run under the planner whose link gets another rate (--to)

A point is a link and a share of exchange in top-2's MoE time, or how long exchanges are beside their window. The width of all FFNs is found
first, so that this machine has it.
Results are added to the JSON file under the name of group, point and routing. Plot: python -m tools.overlap_plot FILE.json IMAGE.png
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tools import overlap_figures
from tools.hosts import Host, two_hosts
from tools.overlap_adaptive import adaptive_summary, change_summary
from tools.overlap_cases import DEEPSPEED, GROUPS, POINTS, POSITIONS, SERIAL, SMALL, STOCK, Point, Run, Size
from tools.overlap_figures import interval
from tools.overlap_rank import PARTS, Job
from tools.overlap_step import step_lines, step_summary
from tools.overlap_transport import summary

LIMIT_SECONDS = 3600.0
CALIBRATIONS = 3
ROUNDS = {"hiding": 161}
WAIT_SECONDS = 120.0  # for the machine to become quiet


SIZED = (*GROUPS, "steps", "change")  # parts whose FFN width is the point's


def run_job(hosts: tuple[Host, Host], job: Job, folder: Path, next_rate: str = "") -> list[dict]:
    """What both ranks found. The link changes to `next_rate` when a rank asks for it. SystemExit with the end of the logs if one fails."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)))
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    processes = []
    for rank, host in enumerate(hosts):
        command = [sys.executable, "-m", "tools.overlap_rank", str(path), str(rank)]
        processes.append(host.run(command, folder / f"rank-{rank}.log", environment | {"OVERLAP_INTERFACE": host.interface}))
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            break
        if (folder / "change").exists():
            for host in hosts:
                host.limit(next_rate)
            (folder / "change").unlink()
        time.sleep(0.1)
    if any(process.poll() != 0 for process in processes):
        logs = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(len(hosts))]
        late = "" if time.monotonic() < deadline else f" It was not done after {LIMIT_SECONDS:.0f} s."
        raise SystemExit("\n".join([f"A rank failed.{late}", *logs]))
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(len(hosts))]


def wait_until_quiet(limit: float) -> float:
    """Cores that others keep busy, once they are fewer than the limit. Raises SystemExit when they do not let go."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (busy := busy_cores()) > limit:
        if time.monotonic() > deadline:
            raise SystemExit(f"Others keep {busy:.2f} cores busy, more than {limit}. Use --busy to measure anyway.")
    return busy


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores computed on average in the next `seconds`, as the kernel counts them."""
    before = processor_ticks()
    time.sleep(seconds)
    spent = [after - earlier for after, earlier in zip(processor_ticks(), before, strict=True)]
    idle = spent[3] + spent[4]
    return (1 - idle / sum(spent)) * (os.cpu_count() or 1)


def processor_ticks() -> list[int]:
    """Of all cores together: user, nice, system, idle, waiting for a disk, interrupts, soft interrupts, stolen."""
    return [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


@dataclass(frozen=True)
class Aim:
    """What a width can be found for. `measured`: its value in what the ranks of the part found; `error`: what may be left;
    `computation`: what grows with the width, in units of the exchanges, at a value.
    """

    rounds: int
    error: float
    measured: Callable[[list[dict]], float]
    computation: Callable[[float], float]


AIMS = {  # by the part that measures it
    "share": Aim(11, 0.02, overlap_figures.share, lambda share: 1 / share - 1),
    "window": Aim(3, 0.1, overlap_figures.over_window, lambda over_window: 1 / over_window),
}


def calibrated(hosts: tuple[Host, Host], job: Job, point: Point, folder: Path) -> Size:
    """The job's size with the FFN as wide as the point needs on this machine and link."""
    part, wanted = ("share", point.share) if point.share else ("window", point.over_window)
    assert wanted is not None, "the point says nothing that a width could be found for"
    aim = AIMS[part]
    ffn, tried = job.size.ffn, list[tuple[int, float]]()
    for number in range(CALIBRATIONS):
        place = folder / f"{part}-{number}"
        place.mkdir()
        trial = replace(job, part=part, folder=str(place), rounds=aim.rounds, evenly=True, size=replace(job.size, ffn=ffn))
        now = aim.measured(run_job(hosts, trial, place))
        if abs(now - wanted) < aim.error:
            break
        tried.append((ffn, aim.computation(now) / aim.computation(wanted)))
        ffn = max(32, round(wider(tried) / 32) * 32)
    return replace(job.size, ffn=ffn)


def wider(tried: list[tuple[int, float]]) -> float:
    """The width at which a line through the last two trials is 1; through the origin while there is one only."""
    (before, least), (ffn, time) = ([(0, 0.0), *tried])[-2:]
    return ffn + (1 - time) * (ffn - before) / (time - least) if time != least else ffn


def figures_of(part: str, found: list[dict]) -> dict:
    """What the ranks' findings say, by group."""
    if part in ("opponents", "core"):
        return overlap_figures.opponents(found)
    if part == "share":
        return {"share": {"median": overlap_figures.share(found)}, "ratios": {}}
    if part == "window":
        return {"comm_over_window": overlap_figures.over_window(found), "ratios": {}}
    if part == "hiding":
        return overlap_figures.alone(found)
    if part == "positions":
        return overlap_figures.positions(found, list(POSITIONS))
    if part == "schedules":
        return overlap_figures.schedules(found)
    if part == "peers":
        return overlap_figures.peers(found, Run(DEEPSPEED, SERIAL).name, Run(DEEPSPEED, STOCK).name)
    summaries = {"transport": summary, "null": null_summary, "adaptive": adaptive_summary, "change": change_summary, "steps": step_summary}
    return summaries[part](found)


def null_summary(found: list[dict]) -> dict[str, dict]:
    """Laps over those of the plain path, and the share of a lap that exchanges' own calls take: of the rank that has the greater."""
    ratios = {name: max((rank["wall_ratios"][name] for rank in found), key=by_median) for name in found[0]["wall_ratios"]}
    return {"ratios": ratios, "added_share": max((rank["added_share"] for rank in found), key=by_median)}


def by_median(figure: overlap_figures.Figure) -> float:
    return figure["median"]


def table(part: str, found: list[dict], figures: dict) -> Iterator[str]:
    if part == "transport":
        yield from (f"{name:24} {', '.join(f'{key} {value:.4g}' for key, value in row.items())}" for name, row in figures["ways"].items())
        return
    if part == "adaptive":
        for name, row in figures["cases"].items():
            worst = f"the worst schedule {row['worst_over_best']:.2f}"
            yield f"{name:36} chosen {row['chosen']:6} best {row['best']:6} over the best {interval(row['regret'])}, {worst}"
        return
    if part == "steps":
        yield from step_lines(figures)
        return
    if part == "null":
        yield from (f"{name} over the plain path: {interval(ratio)}" for name, ratio in figures["ratios"].items())
        yield f"calls that start and end exchanges, copies included, of a lap: {interval(figures['added_share'])}"
        return
    if part == "change":
        yield ", ".join(f"{name} {value if isinstance(value, str | int) else round(value, 3)}" for name, value in figures.items())
        return
    yield from overlap_figures.lines(found, figures)
    worst = max(error for rank in found for error in rank["errors"].values())
    yield f"correct: off float64 by at most {worst:.1e}; gradients equal to the bit over all schedules of as many chunks"
    off = {name: one["counted"] / one["expected"] - 1 for name, one in found[0]["bytes"].items() if one["counted"]}
    if off:
        name = max(off, key=lambda name: abs(off[name]))
        yield f"bytes on the wire: at most {off[name]:+.1%} off the expected ones ({name})"
    busiest = ", ".join(f"{model} {value:.2f}" for model, value in found[0]["busiest"].items())
    yield f"busiest expert over the even share: {busiest}"
    overhead = ", ".join(f"{model} {value:.2%}" for model, value in found[0]["null_overhead"].items())
    if overhead:
        yield f"code around exchanges in the null arm, its copies included, of a lap: {overhead}"


def versions() -> dict[str, str]:
    names = ["torch", "numpy", *(["deepspeed"] if find_spec("deepspeed") else [])]
    return {"python": platform.python_version(), "cores": str(os.cpu_count())} | {name: version(name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*GROUPS, *PARTS])
    parser.add_argument("--point", choices=POINTS, default="60", help="a link, and what exchanges take there (default: %(default)s)")
    parser.add_argument("--routing", choices=("even", "real"), default="even", help="forced balance, or as the gates choose")
    parser.add_argument("--rounds", type=int, help="default 15; of hiding 161")
    parser.add_argument("--ffn", type=int, help="FFN width, instead of finding one for the point")
    parser.add_argument("--pairs", type=int, help="block pairs (default: of the point)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a whole step (part steps)")
    parser.add_argument("--to", default="50mbit", help="the rate after the change (default: %(default)s)")
    parser.add_argument("--busy", type=float, default=0.1, help="cores that others may use when it begins (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a size for a test")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # hosts are taken down on the way out
    point = POINTS[options.point]
    size = SMALL if options.small else point.size
    size = replace(size, pairs=options.pairs or size.pairs, ffn=options.ffn or size.ffn)
    rounds = options.rounds or ROUNDS.get(options.part, 15)
    busy = wait_until_quiet(options.busy)
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder, two_hosts(Path(folder), point.rate) as hosts:
        job = Job(options.part, folder, rounds, options.routing == "even", size, options.small, options.accumulation)
        if (point.share or point.over_window) and options.part in SIZED and not (options.small or options.ffn):
            size = calibrated(hosts, job, point, Path(folder))
            job = replace(job, size=size)
        found = run_job(hosts, job, Path(folder), options.to)
    figures = figures_of(options.part, found)
    title = f"{options.part}, point {options.point}, {options.routing} routing"
    title += f", {options.accumulation} micro-batches" if options.accumulation > 1 else ""
    print(
        title,
        f"({point.rate or 'no limit'}, width {size.hidden}, FFN {size.ffn}, {size.tokens} tokens a rank, others used {busy:.2f} cores)",
    )
    print("\n".join(table(options.part, found, figures)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results = json.loads(options.json.read_text()) if options.json.exists() else {}
        results[title] = {
            "command": ["python", "-m", "tools.bench_overlap", *sys.argv[1:]], "versions": versions(), "busy_cores": busy,
            "rate": point.rate, "share": point.share, "over_window": point.over_window, "rounds": rounds, "size": asdict(size),
            "figures": figures, "ranks": found,
        }  # fmt: skip
        options.json.write_text(json.dumps(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
