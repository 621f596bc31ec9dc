"""The commands of README.md and docs/quickstart.md, run as they are written, on a tiny model and a few files.

The two make targets are left to `.ci/run`. What is made smaller stands in SMALLER; nothing else is changed. Commands of `moetrain`
without a pipe run in this process, the others in a shell. The first `moetrain train` runs in a shell, with torchrun and all; later ones
run here what torchrun would start, which saves importing everything three times more. Commands build on each other, so they are one test.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain import cli, launch

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md")
MODEL = "hidden_size=16 ffn_size=16 expert_ffn_size=16 shared_ffn_size=16 vocab_size=300 max_position=64 num_layers=2"
TINY = [f"model.{size}" for size in [*MODEL.split(), "attention.num_heads=2", "attention.num_kv_heads=1", "attention.head_dim=8"]]
TINY += ["train.tokens=512", "train.global_batch_tokens=128", "data.seq_len=32", "train.sample_tokens=4", "checkpoint.every_steps=2"]
OWN_SOURCE = "data.source=[my_project]"  # instead of the standard library
SMALLER = [
    (r"^\. \.venv/bin/activate$", ""),
    (r"^(moetrain train \+experiment=gpt_moe_8e) --nproc 2$", rf"\1 --nproc 1 {' '.join(TINY)} {OWN_SOURCE}"),
    (r"^(moetrain train .*data=custom.*?)( --nproc 2)?$", rf"\1 {' '.join(TINY)} model.attention.num_kv_heads=2"),
    (r"--vocab-size 2048", "--vocab-size 300 --validation 0.3 --test 0.3"),
    (r"--max-tokens \d+", "--max-tokens 4"),
    (r"^(moetrain env)$", r"\1 --folder my_project"),
]
IN_A_SHELL = re.compile(r"^python\b|[|&;<>]")


def commands(page: str) -> list[str]:
    """The lines of all fenced `sh` blocks, without comments and make targets."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).splitlines()
    return [line.split("  #")[0].rstrip() for line in lines if line and not line.startswith("make ")]


def smaller(command: str) -> str:
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


def here(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a `moetrain` command in this process and its current folder."""

    def become(executable: str, words: list[str]) -> int:
        assert words[1:4] == ["-m", "torch.distributed.run", "--standalone"]
        monkeypatch.setattr(sys, "argv", words[words.index("moetrain.launch") :])
        return launch.main()

    codes: list[int] = []
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # so that it is put back
    monkeypatch.setattr(os, "execv", lambda *words: codes.append(become(*words)))
    code = cli.main(shlex.split(command)[1:])
    return codes[0] if codes else code


def in_a_shell(command: str, folder: Path) -> None:
    """Fails with everything the command said."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder as a clone with a finished training looks like from its root: launch/, some text and runs/gpt_moe_8e."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    shutil.copytree(ROOT / "moetrain" / "model", tmp_path / "my_project", ignore=shutil.ignore_patterns("__pycache__"))
    in_a_shell(smaller("moetrain train +experiment=gpt_moe_8e --nproc 2"), tmp_path)
    return tmp_path


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_commands_of_the_pages_run_in_their_order(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    for page in PAGES:
        shutil.rmtree(clone / "exports", ignore_errors=True)  # each page is followed by itself
        for command in filter(None, map(smaller, commands(page))):
            if IN_A_SHELL.search(command):
                in_a_shell(command, clone)
            else:
                assert here(command, monkeypatch) == 0, command


def test_every_substitution_is_used() -> None:
    """A rule that matches nothing is of a command that the pages no longer have."""
    lines = [line for page in PAGES for line in commands(page)]
    assert len(lines) > 20
    for pattern, _ in SMALLER:
        assert any(re.search(pattern, line) for line in lines), pattern
