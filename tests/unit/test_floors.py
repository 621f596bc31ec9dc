"""What may be imported where, beyond the contracts of `lint-imports`: rooms that run without torch, one owner for a heavy package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moetrain"
FILES = sorted(PACKAGE.rglob("*.py"))
TORCH_FREE_ROOMS = ("base", "store", "text")
OPTIONAL = ("wandb", "transformers", "deepspeed")

# Where a package may be imported, as a prefix of the path below moetrain/; () = nowhere. One owner keeps a change of library small.
OWNERS = {
    "wandb": ("telemetry/wandb.py",),
    "tensorboard": ("telemetry/tensorboard.py",),
    "matplotlib": ("telemetry/",),
    "zarr": ("store/",),
    "megatron": ("data/", "parallel/megatron"),
    "deepspeed": ("parallel/deepspeed.py",),
    "transformers": ("convert/",),
    "tokenizers": ("text/",),
    "hydra": ("config/", "launch.py", "cli.py"),
    "pickle": (),
    "dill": (),
}

# A finder that refuses some packages as if they were not installed.
BLOCK = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
for module in {modules!r}:
    importlib.import_module(module)
"""


def module_name(file: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_with_blocked(modules: list[str], blocked: tuple[str, ...]) -> None:
    """Imports modules in a fresh interpreter in which some packages are absent."""
    program = BLOCK.format(blocked=set(blocked), modules=modules)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr


def imported_packages(node: ast.AST) -> set[str]:
    """Top-level packages that a syntax tree imports when it runs: in functions too, but not for type checkers only."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {node.module.split(".")[0]}
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return set()
    return set().union(*(imported_packages(child) for child in ast.iter_child_nodes(node)))


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Packages that each file of ours imports, by its path below moetrain/."""
    return {file.relative_to(PACKAGE).as_posix(): imported_packages(ast.parse(file.read_text(encoding="utf-8"))) for file in FILES}


def test_the_package_and_its_configuration_import_no_torch():
    configs = [module_name(file) for file in FILES if file.name == "config.py"]
    assert len(configs) >= 8
    import_with_blocked(["moetrain", *configs], ("torch",))


@pytest.mark.parametrize("room", TORCH_FREE_ROOMS)
def test_room_runs_without_torch(room: str):
    import_with_blocked([module_name(file) for file in FILES if file.is_relative_to(PACKAGE / room)], ("torch",))


def test_command_line_starts_without_torch_and_without_the_heavy_libraries():
    import_with_blocked(["moetrain.cli"], ("torch", "megatron", "matplotlib", "tensorboard", *OPTIONAL))


def test_every_module_imports_without_the_optional_packages_and_leaves_megatron_alone_until_it_is_used():
    import_with_blocked([module_name(file) for file in FILES if file.name != "__main__.py"], ("megatron", *OPTIONAL))


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_package_is_imported_by_its_owner_only(package: str, imports: dict[str, set[str]]):
    importers = [file for file, packages in imports.items() if package in packages]
    assert [file for file in importers if not file.startswith(OWNERS[package])] == []


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not():
    source = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d.e import g\nfrom . import h\n"
    assert imported_packages(ast.parse(source)) == {"a", "d"}


def test_the_train_loop_fits_on_a_page() -> None:
    lines = (PACKAGE / "train" / "loop.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
