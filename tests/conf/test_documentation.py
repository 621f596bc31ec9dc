"""docs/configuration.md is what tools/document_config.py writes."""

import subprocess
import sys
from pathlib import Path

from moetrain.config.mistakes import all_keys
from moetrain.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"


def test_page_is_current() -> None:
    command = [sys.executable, str(ROOT / "tools" / "document_config.py"), "--check"]
    result = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_page_has_every_key() -> None:
    text = PAGE.read_text(encoding="utf-8")
    keys = [key for key in all_keys() if not any(other.startswith(key + ".") for other in all_keys())]
    assert len(keys) > len(vars(TrainConfig()))
    assert [key for key in keys if f"| `{key}` |" not in text] == []
