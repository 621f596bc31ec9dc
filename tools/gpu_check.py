"""All that a few minutes on a GPU can tell, in one call: the tests marked gpu, then speeds beside their floors, each as JSON.

    python -m tools.gpu_check                                  on a machine with a GPU; about 8 minutes
    python -m tools.gpu_check --device cpu --quick --out DIR   the same code at toy sizes, without the tests

Run it in the repository's root; moetrain need not be installed. Each part writes OUT/gpu_<part>.json when it is done, so a session that is
cut off keeps what it has. A part that lacks a package is skipped with a sentence; one that fails says why, and the others go on.
The exit status is 1 when a test or a part failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moetrain.base.clock import SystemClock
from moetrain.telemetry.env import collect
from tools.bench_experts import QUICK, SHAPES, bandwidth, benchmark

ROOT = Path(__file__).resolve().parents[1]
TESTS_SECONDS = 180.0  # a test that hangs must leave time for the rest
PRIVATE = ("installed at", "executable", "host", "system")  # of the machine, not of the measurement
Result = dict[str, object]


class PartFailed(Exception):
    """A part that ran and found something wrong; its result is kept."""

    def __init__(self, sentence: str, result: Result) -> None:
        super().__init__(sentence)
        self.result = result


@dataclass
class Session:
    """Where it runs and how much time there is."""

    device: torch.device
    quick: bool
    out: Path
    budget_seconds: float
    started: float

    @property
    def left(self) -> float:
        return self.budget_seconds - (time.monotonic() - self.started)


def environment(session: Session) -> Result:
    """Versions and devices, without what names the machine."""
    facts = collect(session.out, SystemClock(), probe=not session.quick)
    shown: Result = {name: {key: value for key, value in section.items() if key not in PRIVATE} for name, section in facts.items()}
    print(json.dumps(shown, indent=1))
    return shown


def tests(session: Session) -> Result:
    """pytest -m gpu over the files that mark such a test. Raises PartFailed when one fails."""
    if session.device.type != "cuda":
        return {"skipped": "tests marked gpu need a CUDA device"}
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    report = session.out / "gpu_tests.xml"
    # An empty configuration: the project's own asks for plugins that need not be there.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={ROOT}", "-m", "gpu", "-q", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", f"--junit-xml={report}", *files]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    limit = min(max(session.left, 60), TESTS_SECONDS)
    status = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, check=False).returncode
    if not report.is_file():
        raise PartFailed(f"pytest ended with status {status} and no report", {"status": status})
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}
    report.unlink()
    result: Result = {"status": status, "passed": sum(value == "passed" for value in outcomes.values()), "tests": outcomes}
    if status != 0 or not result["passed"]:
        raise PartFailed(f"pytest ended with status {status}, {result['passed']} tests passed", result)
    return result


def outcome(case: ElementTree.Element) -> str:
    """passed, or failed / skipped / error with the first line of why."""
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            return f"{child.tag}: {(child.get('message') or '').splitlines()[0] if child.get('message') else ''}"
    return "passed"


def experts(session: Session) -> Result:
    """The grouped expert matmul in every shape and type."""
    if session.quick:
        return benchmark(session.device, QUICK, ["float32", "bfloat16"], 2, 64, 2**16)
    return benchmark(session.device, SHAPES, ["float32", "bfloat16"], 15, 8192, 2**30)


def null_transport(session: Session) -> Result:
    """What the code around exchanges costs when nothing is exchanged."""
    from tools.gpu_null import overhead

    return overhead(session.device, session.quick, min(20.0, session.left / 8))


def link(name: str) -> Callable[[Session], Result]:
    """ScMoE beside its opponents over an emulated link, at one point of tools/gpu_overlap.py."""

    def part(session: Session) -> Result:
        from tools.gpu_overlap import POINTS, measure

        return measure(POINTS[name], session.device, session.quick, min(18.0, session.left / 8))

    return part


def training(session: Session) -> Result:
    """Steps of gpt_moe_8e and gpt_125m_8e."""
    from tools.bench_step import training

    return training(session.device, 0.0 if session.quick else min(100.0, max(session.left / 2, 10.0)), session.quick)


def generation(session: Session) -> Result:
    """Tokens per second from a key/value cache."""
    from tools.bench_step import generation

    return generation(session.device, bandwidth(session.device, 2**16 if session.quick else 2**30), session.quick)


PARTS: dict[str, Callable[[Session], Result]] = {
    "environment": environment,
    "tests": tests,
    "null_transport": null_transport,
    "link_60": link("60"),
    "experts": experts,
    "link_75": link("75"),
    "training": training,
    "link_15": link("15"),
    "generation": generation,
    "link_60_real": link("60_real"),
}


def run_part(name: str, session: Session) -> str:
    """The part's verdict in a few words; its JSON is written whatever happened."""
    print(f"--- {name} ({session.left:.0f} s left)", flush=True)
    start, verdict, result = time.monotonic(), "done", Result()
    if session.left <= 0:
        return "skipped: no time left"
    try:
        result = PARTS[name](session)
        if "skipped" in result:
            verdict = f"skipped: {result['skipped']}"
    except ModuleNotFoundError as error:
        verdict = f"skipped: it needs the package {error.name}"
    except PartFailed as failure:
        verdict, result = f"FAILED: {failure}", failure.result
    except Exception as error:
        traceback.print_exc()
        verdict = f"FAILED: {type(error).__name__}: {error}"
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
    facts: Result = {"part": name, "verdict": verdict, "seconds": round(time.monotonic() - start, 1), "quick": session.quick}
    facts |= {"torch": torch.__version__, "python": sys.version.split()[0], "device": name_of(session.device)}
    path = session.out / f"gpu_{name}.json"
    path.write_text(json.dumps(facts | result, indent=1) + "\n", encoding="utf-8")
    return verdict


def name_of(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if device.type == "cuda" else "CPU"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that everything runs, measures nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", metavar="DIR", help="where the JSON goes (default: benchmarks)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="no part begins later (default: %(default)g)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; try --device cpu --quick.", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device(options.device)
    session = Session(device, options.quick, options.out, options.budget, time.monotonic())
    verdicts = {name: run_part(name, session) for name in options.parts}
    print("---\n" + "\n".join(f"{name:14} {verdict}" for name, verdict in verdicts.items()))
    return 1 if any(verdict.startswith("FAILED") for verdict in verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
