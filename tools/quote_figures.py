"""Copies figures from benchmarks/*.json into the tables of figures of PAGES, so that nothing is quoted by hand.

    python -m tools.quote_figures            writes the pages
    python -m tools.quote_figures --check    writes nothing; exit status 1 when a figure is not what its file says

A row names its file and key as `benchmarks/FILE.json` `key.inner:format`: a Python format, or `len` for the length of a list. A key that
holds `median` or `mean`, `low` and `high` is written with its interval. Without the file the value reads "see FILE". True and false are
written yes and no.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/checkpoint.md", "docs/overlap.md", "docs/scmoe.md")
ROW = re.compile(r"^(\| [^|]+ \| )([^|]+)( \| `(benchmarks/\w+\.json)` `([^`]+?)(?::([^` ]+))?` \|.*)$", re.MULTILINE)
LIKE_A_ROW = re.compile(r"^\|.*`benchmarks/\w+\.json` `.*$", re.MULTILINE)


def figure(root: Path, file: str, key: str, style: str | None) -> str:
    """The value as the table shows it. Raises KeyError for a key that the file does not have."""
    if not (root / file).is_file():
        return f"see {file}"
    value = json.loads((root / file).read_text(encoding="utf-8"))
    for name in key.split("."):
        value = value[name]
    if style == "len":
        return str(len(value))
    if isinstance(value, dict):
        middle = "median" if "median" in value else "mean"
        middle, low, high = (format(value[name], style or "") for name in (middle, "low", "high"))
        return f"{middle} ({low} to {high})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, style or "")


def quoted(page: str, root: Path) -> str:
    """The page with every figure as its file says. Raises ValueError for a row that names a figure in another form."""
    if wrong := [line for line in LIKE_A_ROW.findall(page) if not ROW.fullmatch(line)]:
        raise ValueError(f"this row's figure would stay as it is: {wrong[0]}")
    return ROW.sub(lambda row: f"{row[1]}{figure(root, row[4], row[5], row[6])}{row[3]}", page)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    wrong = False
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        current = quoted(page, ROOT)
        if not options.check:
            (ROOT / name).write_text(current, encoding="utf-8")
        elif page != current:
            print(f"{name} quotes figures that benchmarks/ does not hold: run python -m tools.quote_figures.")
            wrong = True
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
