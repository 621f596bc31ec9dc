"""Where the YAML files are and what they offer."""

from pathlib import Path

GROUPS = ("model", "routing", "parallel", "engine", "data", "optim", "checkpoint", "telemetry", "profile", "debug", "experiment")


def conf_folder() -> Path:
    """In the package when installed from a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def options(group: str) -> dict[str, str]:
    """The options of a group with the first comment line of each, `# @package` lines aside."""
    return {file.stem: _first_comment(file) for file in sorted((conf_folder() / group).glob("*.yaml"))}


def _first_comment(file: Path) -> str:
    comments = [line.lstrip("# ").strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next((comment for comment in comments if not comment.startswith("@package")), "")
