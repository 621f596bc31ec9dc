"""What is shipped and how it is installed: the wheel, the pins, the Makefile, the CI script, the images."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.test_floors import imported_packages

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
PIP = "python -m pip --quiet --disable-pip-version-check --no-input"
INSTALL = f"{PIP} install --no-compile --constraint constraints.txt torch==2.13.0"


def make(folder: Path, *arguments: str, path: str = SYSTEM_PATH, **variables: str) -> subprocess.CompletedProcess[str]:
    """make in a folder, with nothing of this session's make or virtual environment around it."""
    make_tool = shutil.which("make")
    assert make_tool is not None
    environment = {"PATH": path, "HOME": str(folder), "LC_ALL": "C", "LOG": str(folder / "python.log")} | variables
    return subprocess.run([make_tool, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The Makefile in a folder with a space, and a .venv whose Python only writes down what it was asked to do."""
    folder = tmp_path / "my clone"
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("python", "moetrain", "lint-imports"):
        stub = binaries / name
        stub.write_text(
            f'#!/bin/sh\necho "{name} $*" >>"$LOG"\nenv | grep -E "^(OMP_NUM_THREADS|PYTHONHASHSEED)=" | sort >>"$LOG"\n', encoding="utf-8"
        )
        stub.chmod(0o755)
    return folder


def commands(clone: Path) -> list[str]:
    """What the stub tools were called with since the last look."""
    log = clone / "python.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_ships_every_configuration_file_beside_the_package(wheel: zipfile.ZipFile):
    shipped = {name.removeprefix("moetrain/") for name in wheel.namelist() if name.startswith("moetrain/conf/") and name.endswith(".yaml")}
    present = {file.relative_to(ROOT).as_posix() for file in (ROOT / "conf").rglob("*.yaml")}
    assert present
    assert shipped == present


def test_wheel_is_typed_and_has_the_command_and_nothing_but_the_package(wheel: zipfile.ZipFile):
    names = wheel.namelist()
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "moetrain = moetrain.cli:main" in wheel.read(entry_points).decode()
    assert "moetrain/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"moetrain"}


def test_wheel_runs_from_elsewhere_and_finds_its_configuration(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    program = "from moetrain.config import conf_folder; print(conf_folder())"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert result.stdout.strip() == str(tmp_path / "moetrain" / "conf"), result.stderr


def test_every_imported_package_is_a_declared_requirement():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "moetrain").rglob("*.py")]
    imported = set().union(*(imported_packages(tree) for tree in trees)) - set(sys.stdlib_module_names) - {"moetrain"}
    owners = packages_distributions()
    extras = [text for name in ("hf", "wandb", "s3") for text in PROJECT["optional-dependencies"][name]]
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"] + extras}
    assert "numpy" in imported
    assert [name for name in sorted(imported) if declared.isdisjoint(canonicalize_name(owner) for owner in owners[name])] == []


def test_every_requirement_is_pinned_for_both_pythons_except_torch():
    texts = PROJECT["dependencies"] + [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    wanted = {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    for python in ("3.11", "3.12"):
        valid = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        names = [canonicalize_name(pin.name) for pin in valid]
        assert len(names) == len(set(names)), f"two pins of one package for Python {python}"
        assert set(wanted) - set(names) == {"torch", "moetrain"}, f"Python {python}"
        for pin in valid:
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin} is no exact pin"
            if asked := wanted.get(canonicalize_name(pin.name)):
                assert asked.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin} is not what pyproject.toml allows"


def test_setup_installs_torch_first_and_exactly_then_everything_pinned(clone: Path):
    result = make(clone, "setup")
    assert result.returncode == 0, result.stderr
    assert commands(clone) == [f"{INSTALL} hatchling", f"{INSTALL} --no-build-isolation --editable .[hf,wandb,dev]"]


def test_check_adds_the_linters_once_then_lints_types_and_floors(clone: Path):
    make(clone, "setup")
    commands(clone)
    linters = f"{INSTALL} --no-build-isolation --editable .[lint]"
    checks = ["python -m ruff check .", "python -m ruff format --check .", "python -m pyright", "lint-imports "]
    assert make(clone, "check").returncode == 0
    assert commands(clone) == [linters, *checks]
    make(clone, "check")
    assert commands(clone) == checks


def test_setup_does_nothing_twice_and_again_when_pins_or_torch_change(clone: Path):
    make(clone, "setup")
    assert len(commands(clone)) == 2
    make(clone, "setup")
    assert commands(clone) == []
    stamp = clone / ".venv" / "installed-torch-2.13.0"
    newer = stamp.stat().st_mtime_ns + 1_000_000_000
    os.utime(clone / "constraints.txt", ns=(newer, newer))
    make(clone, "setup")
    assert len(commands(clone)) == 2
    make(clone, "setup", "TORCH=2.11.0")
    assert "torch==2.11.0" in commands(clone)[0]
    make(clone, "setup", "TORCH=2.13.0")
    assert "torch==2.13.0" in commands(clone)[0], "the other torch had replaced this one"


def test_failed_install_is_reported_and_tried_again(clone: Path):
    python = clone / ".venv" / "bin" / "python"
    works = python.read_text(encoding="utf-8")
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert make(clone, "setup").returncode != 0
    python.write_text(works, encoding="utf-8")
    assert make(clone, "setup").returncode == 0
    assert len(commands(clone)) == 2


def test_make_train_runs_the_main_job_on_two_processes(clone: Path):
    make(clone, "setup")
    commands(clone)
    assert make(clone, "train", "ARGS=optim.lr=1e-3 run.name=x").returncode == 0
    job = "moetrain train --nproc 2 +experiment=gpt_moe_8e optim.lr=1e-3 run.name=x"
    assert commands(clone) == [job, "OMP_NUM_THREADS=1"]


def test_make_test_runs_every_cpu_test_and_holds_them_against_the_coverage_page(clone: Path):
    make(clone, "setup")
    commands(clone)
    assert make(clone, "test").returncode == 0
    session = "python -m pytest -n 3 --dist worksteal -m not gpu and not slow --coverage-map=docs/coverage.md tests"
    assert commands(clone) == [session, "OMP_NUM_THREADS=1", "PYTHONHASHSEED=0"]


def test_absent_python_is_one_sentence(clone: Path):
    shutil.rmtree(clone / ".venv")
    result = make(clone, "setup", "PYTHON=")
    assert result.returncode != 0
    assert "moetrain needs Python 3.11 or 3.12 and found neither on PATH" in result.stderr
    assert not (clone / ".venv").exists()


def test_python_without_venv_is_one_sentence(clone: Path):
    shutil.rmtree(clone / ".venv")
    bare = clone / "bare python"
    bare.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    bare.chmod(0o755)
    result = make(clone, "setup", f"PYTHON={bare}")
    assert result.returncode != 0
    assert "cannot make virtual environments; install its venv package" in result.stderr
    assert not (clone / ".venv").exists()


def test_python_is_chosen_by_its_version_and_not_by_its_name(clone: Path, tmp_path: Path):
    shutil.rmtree(clone / ".venv")
    for name, status in (("python3.11", 127), ("python3.12", 1), ("python3", 0)):  # a version manager's shim; an old one; a fitting one
        tool = tmp_path / "tools" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\nexit {status}\n", encoding="utf-8")
        tool.chmod(0o755)
    result = make(clone, "--dry-run", "setup", path=f"{tmp_path / 'tools'}:{SYSTEM_PATH}")
    assert '"python3" -m venv --clear .venv' in result.stdout


def test_help_lists_every_target(clone: Path):
    text = make(clone).stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets is not None
    assert [target for target in targets[1].split() if f"make {target} " not in text] == []


def test_ci_runs_make_test_from_the_root_wherever_it_is_called(tmp_path: Path):
    stub = tmp_path / "make"
    stub.write_text('#!/bin/sh\necho "$PWD: $*"\n', encoding="utf-8")
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{SYSTEM_PATH}"}
    result = subprocess.run(
        [str(ROOT / ".ci" / "run")], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == f"{ROOT}: test\n"


def test_images_have_both_targets_and_copy_only_what_exists():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^FROM \w+ AS (cpu|cuda)$", text, re.MULTILINE) == ["cuda", "cpu"]
    copied = [path for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for path in line.split()]
    assert copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
    ignored = set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
    assert ignored.isdisjoint(copied)


def test_image_installs_the_torch_that_the_makefile_installs():
    makefile = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    image = re.search(r"^ARG TORCH=(\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert makefile is not None and image is not None
    assert makefile[1] == image[1]
