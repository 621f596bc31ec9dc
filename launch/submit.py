"""Submits training runs to Slurm: writes launch/slurm/train.sbatch with your resources into the run folder and hands it to sbatch.

    python launch/submit.py --nodes 4 --partition gpu +experiment=olmoe_1b_7b optim.lr=4e-4
    python launch/submit.py -m --dry-run +experiment=gpt_125m_8e optim.lr=1e-3,3e-4 model.routing.top_k=1,2     (a grid: four jobs)

The same command again resumes the run: its name is the experiment's (or run.name) and, in a sweep, what the job differs in.
Runs on a login node: needs Python alone, no torch and no moetrain.
"""

import argparse
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "launch" / "slurm" / "train.sbatch"
OPENING, CLOSING = "([{", ")]}"


class SubmitError(Exception):
    """A request that cannot be submitted: one sentence."""


@dataclass
class Job:
    """One run: its name, the folder it lies in, and every override it is started with except run.name and run.folder."""

    name: str
    folder: str
    overrides: list[str]

    @property
    def run(self) -> Path:
        return ROOT / self.folder / self.name


def split_choices(value: str) -> list[str]:
    """The values of `a,b,c`; commas inside brackets or quotes belong to a value."""
    choices, depth, quote = [""], 0, ""
    for character in value:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += 0 if quote else (character in OPENING) - (character in CLOSING)
        if character == "," and depth == 0 and not quote:
            choices.append("")
        else:
            choices[-1] += character
    return choices


def split_override(override: str) -> tuple[str, str]:
    """`key=value` as a pair; `~key` (a deletion) has an empty value."""
    key, equals, value = override.partition("=")
    if not re.fullmatch(r"(\+{0,2}|~)[A-Za-z_][\w./@-]*", key) or not (equals or key.startswith("~")):
        raise SubmitError(f"{override!r} is not an override; write key=value, such as optim.lr=1e-3 or +experiment=gpt_moe_8e.")
    return key, value


def expand(overrides: list[str], sweep: bool) -> list[Job]:
    """The jobs of a request: one, or with `sweep` one for each combination of the listed choices, named by what differs."""
    pairs = [split_override(override) for override in overrides]
    keys = [key for key, _ in pairs]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise SubmitError(f"{repeated[0]} is given twice.")
    choices = [split_choices(value) for _, value in pairs]
    swept = [key for key, values in zip(keys, choices, strict=True) if len(values) > 1]
    if swept and not sweep:
        raise SubmitError(f"{swept[0]} has several values; add -m to submit one job for each.")
    if sweep and not swept:
        raise SubmitError("-m needs at least one key with several values, such as optim.lr=1e-3,3e-4.")
    jobs = [name_job(dict(zip(keys, values, strict=True)), swept) for values in itertools.product(*choices)]
    names = [job.name for job in jobs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SubmitError(f"Two jobs of this sweep would be named {repeated[0]}; they would share a run folder.")
    return jobs


def name_job(values: dict[str, str], swept: list[str]) -> Job:
    """One combination as a job: run.name or the experiment's name, then each swept key with its value."""
    values = dict(values)
    folder = values.pop("run.folder", "runs")
    base = values.pop("run.name", None) or values.get("+experiment", "scratch")
    # a swept experiment is the base already
    differences = [f"{slug(key)}-{slug(values[key])}" for key in swept if key in values and values[key] != base]
    name = "-".join([slug(base), *differences])
    if len(name) > 200:
        raise SubmitError(f"The run name {name[:60]}... has {len(name)} characters; sweep fewer keys at once or give a shorter run.name.")
    return Job(name, folder, [key if key.startswith("~") and not value else f"{key}={value}" for key, value in values.items()])


def slug(text: str) -> str:
    """Text as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")


def directives(job: Job, arguments: argparse.Namespace) -> dict[str, str]:
    """The #SBATCH lines of a job that differ from the template; an empty value removes the template's line."""
    lines = {
        "job-name": job.name,
        "nodes": str(arguments.nodes),
        "gpus-per-node": str(arguments.gpus_per_node) if arguments.gpus_per_node else "",
        "cpus-per-task": str(arguments.cpus_per_task),
        "time": arguments.time,
        "output": f'"{Path(job.folder, job.name, "log").as_posix()}/slurm-%j.log"',
    }
    optional = {"partition": arguments.partition, "account": arguments.account, "qos": arguments.qos}
    return lines | {key: value for key, value in optional.items() if value}


def render(template: str, job: Job, lines: dict[str, str]) -> str:
    """The template with its #SBATCH lines replaced or extended by `lines`, and the job's overrides in place of its arguments."""
    prefix, remaining, head = "#SBATCH --", dict(lines), []
    source = template.splitlines()
    end = 1 + max(index for index, line in enumerate(source) if line.startswith(prefix))
    for line in source[:end]:
        key = line.removeprefix(prefix).partition("=")[0]
        value = remaining.pop(key, None) if line.startswith(prefix) else None
        if value is None:
            head.append(line)
        elif value:
            head.append(f"{prefix}{key}={value}")
    head += [f"{prefix}{key}={value}" for key, value in remaining.items() if value]
    arguments = shlex.join([*job.overrides, f"run.folder={job.folder}", f"run.name={job.name}"])
    return "\n".join([*head, "", f"set -- {arguments}", *source[end:], ""])


def submit(job: Job, script: str) -> str:
    """Keeps the script in the run folder and submits it from the repository's root; returns what sbatch said."""
    if shutil.which("sbatch") is None:
        raise SubmitError("sbatch is not on PATH; submit from a Slurm login node, or see the script with --dry-run.")
    (job.run / "log").mkdir(parents=True, exist_ok=True)
    path = job.run / "job.sbatch"
    path.write_text(script, encoding="utf-8")
    result = subprocess.run(["sbatch", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SubmitError(f"sbatch refused {path}: {result.stderr.strip()}")
    return result.stdout.strip()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; every number and word that goes into an #SBATCH line is checked here."""
    parser = argparse.ArgumentParser(prog="submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="overrides of launch/train.py, such as +experiment=NAME key=value")
    parser.add_argument("-m", "--sweep", action="store_true", help="one job for each combination of comma-separated values")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts; write and submit nothing")
    parser.add_argument("--nodes", type=at_least(1), default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument(
        "--gpus-per-node", type=at_least(0), default=8, metavar="N", help="GPUs, one process each; 0 = one CPU process (default 8)"
    )
    parser.add_argument(
        "--cpus-per-task", type=at_least(1), default=32, metavar="N", help="CPU cores of a node for all its processes (default 32)"
    )
    parser.add_argument("--time", type=matching(r"(\d+-)?\d+(:\d+){0,2}"), default="24:00:00", help="limit, [days-]hours:minutes:seconds")
    for option in ("partition", "account", "qos"):
        parser.add_argument(f"--{option}", type=matching(r"[\w.,:-]+"), metavar="NAME", help=f"Slurm {option}")
    return parser.parse_intermixed_args(arguments)


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: an integer no smaller than `smallest`."""

    def convert(text: str) -> int:
        if not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {smallest}")
        return int(text)

    return convert


def matching(pattern: str) -> Callable[[str], str]:
    """An argparse type: a word that matches `pattern` wholly."""

    def convert(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} does not look like one")
        return text

    return convert


def main(arguments: list[str]) -> int:
    request = parse(arguments)
    try:
        template = TEMPLATE.read_text(encoding="utf-8")
        for job in expand(request.overrides, request.sweep):
            script = render(template, job, directives(job, request))
            print(script if request.dry_run else f"{job.name}: {submit(job, script)}", flush=True)
    except SubmitError as error:
        print(f"submit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
