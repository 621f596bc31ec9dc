"""The `moetrain` command: help, dispatch, errors, and what `moetrain train` becomes."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from moetrain import cli
from moetrain.base.errors import DataError

ROOT = Path(__file__).parents[2]

LIGHT = """
import contextlib, io, sys
from moetrain.cli import ROOMS, main
for words in [["--help"], *[[verb, "--help"] for verb in ROOMS]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(words)
    assert "moetrain " + words[0] in out.getvalue() or words == ["--help"], (words, out.getvalue())
    heavy = {"torch", "transformers", "megatron", "matplotlib", "wandb"} & set(sys.modules)
    assert not heavy, (words, heavy)
    if words == ["--help"]:
        assert not {"hydra", "rich", "numpy"} & set(sys.modules)
"""


def test_help_of_every_command_imports_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_help_has_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in cli.ROOMS:
        assert re.search(rf"^  {verb} ", text, re.MULTILINE), verb
        assert re.search(rf"^ {{10,}}moetrain {verb}\b", text, re.MULTILINE), verb


EXAMPLES = [example.split(" ", 1) for example in re.findall(r"^ {10,}moetrain (.*)$", cli.HELP, re.MULTILINE)]


@pytest.mark.parametrize("verb", cli.ROOMS)
def test_example_of_the_help_parses(verb: str) -> None:
    """The words after `moetrain VERB` suit the parser of that command."""
    words = next(shlex.split(" ".join(example)) for example in EXAMPLES if example[0] == verb)
    parser = argparse.ArgumentParser()
    import_module(cli.ROOMS[verb]).add_parsers(parser.add_subparsers())
    args, rest = parser.parse_known_args(words)
    assert callable(args.run)
    assert rest == [] or "overrides" in args


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "Usage: moetrain COMMAND" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from moetrain import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_unknown_command_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.strip() == "There is no command trian. Did you mean train? moetrain --help lists all."


def room(run: object) -> ModuleType:
    module = ModuleType("room")

    def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        subparsers.add_parser("env").set_defaults(run=run)

    module.add_parsers = add_parsers  # pyright: ignore[reportAttributeAccessIssue]
    return module


def test_errors_are_a_sentence_and_bugs_keep_their_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> object:
        def run(args: argparse.Namespace) -> int:
            raise error

        return lambda name: room(run)

    monkeypatch.setattr(cli, "import_module", fails(DataError("No text.", "Add some.")))
    assert cli.main(["env"]) == 2
    assert capsys.readouterr().err == "No text. Add some.\n"
    monkeypatch.setattr(cli, "import_module", fails(KeyboardInterrupt()))
    assert cli.main(["env"]) == 130
    monkeypatch.setattr(cli, "import_module", fails(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


def test_exit_code_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "import_module", lambda name: room(lambda args: 7))
    assert cli.main(["env"]) == 7


def test_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["config", "--colour"])
    assert end.value.code == 2
    assert "unrecognized arguments: --colour" in capsys.readouterr().err


def test_train_becomes_torchrun_with_overrides_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        executed.append(words)
        raise KeyboardInterrupt  # execv never returns

    monkeypatch.setattr(os, "execv", execv)
    assert cli.main(["train", "+experiment=gpt_moe_8e", "--nproc", "2", "optim.lr=2e-3", "--max-restarts", "3", "run.seed=4"]) == 130
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    assert executed == [[*torchrun, "-m", "moetrain.launch", "+experiment=gpt_moe_8e", "optim.lr=2e-3", "run.seed=4"]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["+experiment=gpt_moe_8"], "+experiment=gpt_moe_8 is not possible: there is no such experiment. Did you mean gpt_moe_8e?"),
        (["--nproc", "3"], "train.global_batch_tokens=4096 is not possible: its 16 sequences"),
        (["data=custom"], "data.corpora=[''] is not possible: training needs the folder of a prepared corpus"),
    ],
)
def test_train_checks_before_it_starts_processes(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *words]) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_train_plans_without_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "+experiment=gpt_moe_8e", "--nproc", "4", "debug=plan"]) == 0
    assert "gpt_moe_8e on 4 ranks" in capsys.readouterr().out


def test_plan_takes_a_name_or_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "olmoe_1b_7b", "--world", "16", "parallel.ep=8"]) == 0
    assert "olmoe_1b_7b on 16 ranks" in capsys.readouterr().out
    assert cli.main(["plan", "model=gpt_125m", "--world", "2"]) == 0
    assert "321,768,960" in capsys.readouterr().out
    assert cli.main(["plan", "olmoe_1b_7b", "debug.world=64"]) == 0
    assert "olmoe_1b_7b on 64 ranks" in capsys.readouterr().out
    assert cli.main(["plan", "olmo"]) == 2
    assert "Did you mean olmoe_1b_7b?" in capsys.readouterr().err


def test_config_prints_yaml_that_composes_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    from moetrain.config import compose, to_config

    assert cli.main(["config", "+experiment=gpt_350m_16e", "optim.lr=0.25"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed == OmegaConf.structured(to_config(compose(["+experiment=gpt_350m_16e", "optim.lr=0.25"])))


def test_experiments_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["experiments"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 6
    assert all(re.match(r"\w+ {2,}\S.{20,}", line) for line in lines)
