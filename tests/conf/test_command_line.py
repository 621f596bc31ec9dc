"""launch/train.py as a user starts it: what it prints, how it ends, and what it leaves behind (nothing)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from moetrain import launch
from moetrain.base.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"
MISTAKE = "optim.lrr=1 is not possible: there is no such key. Did you mean optim.lr?"

# torch is refused as if it were not installed, and memory is limited to 4 GiB of address space.
BARE = """
import resource, runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformers"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocked())
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def started(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in an empty folder; tests fail if it leaves anything there."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, *words], cwd=folder, env=settings, capture_output=True, text=True, timeout=100, check=False)
    assert list(folder.iterdir()) == [], "the command left something behind"
    return result


Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def run_main(arguments: Sequence[str], monkeypatch: Patch, capsys: Capture, **environment: str) -> tuple[int, str, str]:
    """The same in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # so that it is put back
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    code = launch.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_cfg_job_prints_the_composed_configuration(tmp_path: Path) -> None:
    result = started(tmp_path, str(SCRIPT), "+experiment=gpt_moe_8e_top2", "optim.lr=0.5", "--cfg", "job", "--resolve")
    assert result.returncode == 0, result.stderr
    assert "name: gpt_moe_8e_top2" in result.stdout
    assert "lr: 0.5" in result.stdout
    assert "renormalize: true" in result.stdout


def test_plan_needs_no_torch_no_group_and_little_memory(tmp_path: Path) -> None:
    words = ("-c", BARE, str(SCRIPT), "+experiment=qwen3_30b_a3b", "debug=plan", "debug.world=64")
    result = started(tmp_path, *words)
    assert result.returncode == 0, result.stderr
    for shown in ("qwen3_30b_a3b on 64 ranks", "30,532,122,624", "expert parallel (ep)", "all-to-all per step", "partial checkpoint"):
        assert shown in result.stdout


def test_installed_package_brings_its_own_conf(tmp_path: Path) -> None:
    """The layout of the wheel: conf/ inside the package, no launch/ beside it."""
    package, folder = tmp_path / "site" / "moetrain", tmp_path / "empty"
    shutil.copytree(ROOT / "moetrain", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", package / "conf")
    (package / "conf" / "experiment" / "shipped.yaml").write_text("# @package _global_\n# Only here\n", encoding="utf-8")
    folder.mkdir()
    result = started(folder, "-m", "moetrain.launch", "+experiment=shipped", "debug=plan", PYTHONPATH=str(package.parent))
    assert result.returncode == 0, result.stderr
    assert "parameters" in result.stdout


def test_mistake_is_one_line_without_a_trace(tmp_path: Path) -> None:
    result = started(tmp_path, str(SCRIPT), "+experiment=gpt_moe_8e", "optim.lrr=1")
    assert result.returncode == 2
    assert result.stderr.strip() == MISTAKE
    assert result.stdout == ""


def test_multirun_under_torchrun_is_refused_with_the_way_to_do_it(tmp_path: Path) -> None:
    result = started(tmp_path, str(SCRIPT), "-m", "+experiment=gpt_moe_8e", "run.seed=1,2", RANK="0", WORLD_SIZE="2")
    assert result.returncode == 2
    assert "launch/submit.py -m" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.dist
def test_two_ranks_say_a_mistake_once(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), "optim.lrr=1")
    result = started(tmp_path, *torchrun)
    assert result.returncode != 0
    assert result.stderr.count(MISTAKE) == 1


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--multi", "hydra.mode=MULTIRUN"])
def test_every_spelling_of_multirun_is_refused(flag: str, monkeypatch: Patch, capsys: Capture) -> None:
    code, _, err = run_main([flag, "run.seed=1,2"], monkeypatch, capsys)
    assert code == 2
    assert "--multirun is not possible" in err


def test_other_ranks_are_quiet_and_let_rank_0_speak_before_torchrun_ends_it(monkeypatch: Patch, capsys: Capture) -> None:
    waits: list[float] = []
    monkeypatch.setattr("moetrain.launch.time.sleep", waits.append)
    assert run_main(["optim.lrr=1"], monkeypatch, capsys, RANK="0")[0] == 2
    assert waits == []
    assert run_main(["optim.lrr=1"], monkeypatch, capsys, RANK="1") == (2, "", "")
    assert waits == [launch.GRACE_SECONDS]
    assert run_main(["debug=plan"], monkeypatch, capsys, RANK="1", WORLD_SIZE="2") == (0, "", "")


def test_plan_of_the_ranks_that_were_started(monkeypatch: Patch, capsys: Capture) -> None:
    code, out, _ = run_main(["debug=plan"], monkeypatch, capsys, RANK="0", WORLD_SIZE="2")
    assert code == 0
    assert "scratch on 2 ranks" in out


def test_plan_of_an_uneven_batch_says_what_is_wrong(monkeypatch: Patch, capsys: Capture) -> None:
    code, out, _ = run_main(["debug=plan", "debug.world=3"], monkeypatch, capsys)
    assert code == 0
    assert "Training would not start like this: train.global_batch_tokens=4096 is not" in out


def test_uneven_batch_does_not_train(monkeypatch: Patch, capsys: Capture) -> None:
    code, _, err = run_main([], monkeypatch, capsys, RANK="0", WORLD_SIZE="3")
    assert code == 2
    assert err.startswith("train.global_batch_tokens=4096 is not possible")


def test_an_error_of_one_rank_is_said_by_that_rank(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("RANK", "3")
    assert launch.report(CheckpointError("It is damaged.", "Take another.")) == 2
    assert launch.report(ConfigError("Wrong everywhere.")) == 2
    assert capsys.readouterr().err == "rank 3: It is damaged. Take another.\n"


def test_interrupt_ends_with_130(monkeypatch: Patch, capsys: Capture) -> None:
    def interrupted(arguments: Sequence[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "configured", interrupted)
    assert run_main([], monkeypatch, capsys)[0] == 130


def test_help_lists_groups_and_ways_on(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as end:
        launch.main()
    assert not end.value.code
    out = capsys.readouterr().out
    for shown in ("+experiment=NAME", "experiment: gpt_125m_8e", "routing: bias, capacity, default, top2", "--cfg job", "debug=plan"):
        assert shown in out


def test_sweep_values_of_the_help_are_those_of_submit() -> None:
    """The refusal of --multirun names a script and a flag that exist."""
    text = (ROOT / "launch" / "submit.py").read_text(encoding="utf-8")
    assert '"-m"' in text
