"""`moetrain checkpoint VERB` for tests: in an interpreter that refuses torch, or in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

from moetrain.cli import main
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, seal
from moetrain.store.objects import CheckpointFolder

ROOT = Path(__file__).parents[2]
PROGRAM = """
import argparse, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("torch is blocked")
sys.meta_path.insert(0, Blocked())
from moetrain.base.errors import MoetrainError
from moetrain.checkpoint.command import add_parsers
parser = argparse.ArgumentParser()
add_parsers(parser.add_subparsers())
arguments = parser.parse_args(["checkpoint", *sys.argv[1:]])
try:
    sys.exit(arguments.run(arguments))
except MoetrainError as error:
    print(error)
    sys.exit(2)
"""


def moetrain_checkpoint(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def moetrain(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


def points(run_folder: Path) -> list[Manifest]:
    return [point for point in CheckpointFolder(run_folder / "checkpoint", Io()).history() if isinstance(point, Manifest)]


def claimed_elsewhere(checkpoint: Path) -> None:
    """The newest claim is one of another machine: nobody here knows whether its job is alive."""
    owner = {"host": "elsewhere", "pid": os.getpid(), "time": 0.0}
    (checkpoint / "claims" / "000002").write_bytes(seal(json.dumps(owner).encode()))
