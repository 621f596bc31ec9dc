"""`moetrain env` and env.json."""

import argparse
import json
import os
from pathlib import Path

import pytest

from moetrain.base.clock import SystemClock
from moetrain.base.errors import MoetrainError
from moetrain.telemetry import env
from moetrain.telemetry.command import add_parsers


def run_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    args = parser.parse_args(["env", *words])
    return args.run(args)


def test_the_report_names_versions_devices_backends_and_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--folder", str(tmp_path)) == 0
    report = capsys.readouterr().out
    words = ("moetrain", "python", "torch  ", "zarr", "gpu", "gloo", "torch kernels", "total", "write with fsync", "matmul", "a free port")
    for word in words:
        assert word in report, word
    assert "rename and fsync  " in report and "DO NOT WORK" not in report
    assert not list(tmp_path.iterdir()), "the probe leaves nothing behind"


def test_json_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("--json", "--folder", str(tmp_path))
    facts = json.loads(capsys.readouterr().out)
    assert facts["disk"]["rename and fsync"] == "work"
    assert facts["distributed"]["gloo"] is True
    assert facts["cpu"]["cores usable"] >= 1


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(MoetrainError, match="not a folder"):
        run_command("--folder", str(tmp_path / "absent"))


def test_env_json_of_a_run_needs_no_measurement(tmp_path: Path) -> None:
    env.write_env(tmp_path, SystemClock())
    facts = json.loads((tmp_path / "env.json").read_text())
    assert set(facts) == {"moetrain", "packages", "cpu", "memory", "devices", "distributed"}


def test_an_absent_package_is_said() -> None:
    assert env.version("no-such-package-anywhere") == "not installed"


def test_a_disk_without_rename_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("not on this disk")

    assert env.commits(tmp_path)
    monkeypatch.setattr(os, "replace", refuse)
    assert not env.commits(tmp_path)
