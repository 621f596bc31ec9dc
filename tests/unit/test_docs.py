"""What README.md and docs/ say is there: links, paths, commands, tests, keys and figures."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from moetrain import cli
from moetrain.config.mistakes import all_keys
from tools.quote_figures import figure, quoted

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WITH_THE_FIGURES = {"docs/images/gpt_moe_8e.png": "benchmarks/learn.json"}  # drawn from the run that the file measures
FOLDERS = "moetrain|conf|launch|tools|tests|docs"


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """Without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        name = file.resolve().relative_to(ROOT).as_posix()
        if name in WITH_THE_FIGURES and not (ROOT / WITH_THE_FIGURES[name]).is_file():
            continue
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_code_spans_exist(page: str) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)(?:::\w+)?`", prose(page)):
        if path not in WITH_THE_FIGURES and not re.search("[A-Z]{2}", path):  # conf/GROUP stands for any
            assert list(ROOT.glob(path.rstrip("/"))), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_run_with_python_exist(page: str) -> None:
    for words in re.findall(r"python (?:-m )?((?:tools|launch)[./]\w+(?:\.py)?)", text(page)):
        assert (ROOT / (words if "/" in words else words.replace(".", "/") + ".py")).is_file(), f"{page} runs {words}"


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_code_spans_are_keys_of_the_configuration(page: str) -> None:
    """`optim.lr`, `model.rope` or `checkpoint.resume=auto`; a group is a key too."""
    roots = "run|train|model|data|parallel|engine|optim|checkpoint|telemetry|profile|debug"
    keys = set(all_keys())
    for key in re.findall(rf"`((?:{roots})\.[a-z][a-z_.\d]*)(?:=[^`]*)?`", prose(page)):
        plain = re.sub(r"\.\d+\..*", "", key)  # into a list
        is_file = re.search(r"\.(py|md|json|idx|bin|yaml|safetensors|sbatch)", key)
        assert is_file or plain in keys or any(known.startswith(plain + ".") for known in keys), f"{page} names {key}"


def parser_of(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(cli.ROOMS[verb]).add_parsers(parser.add_subparsers())
    return parser


def command_table() -> list[str]:
    """The commands of README's table."""
    return re.findall(r"^\| `moetrain ([^`]+)` \|", text("README.md"), re.MULTILINE)


def test_the_table_of_commands_has_every_verb_once() -> None:
    assert sorted(command.split()[0] for command in command_table()) == sorted(cli.ROOMS)


def test_commands_of_the_table_suit_their_parsers() -> None:
    for command in command_table():
        words = ["4" if word == "N" else word.removesuffix("...") for word in command.split()]
        args, rest = parser_of(words[0]).parse_known_args(words)
        assert callable(args.run) and not rest, command


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_fenced_blocks_suit_their_parsers(page: str) -> None:
    fenced = "\n".join(re.findall(r"^```.*?\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL))
    for line in re.findall(r"^moetrain (.*)$", fenced, re.MULTILINE):
        words = [word for word in shlex.split(re.split(r"\s{3,}|  #", line)[0]) if not word.startswith("[")]
        if words[0].isupper() or "]" in line:  # a synopsis with optional parts
            continue
        args, rest = parser_of(words[0]).parse_known_args(words)
        assert callable(args.run), line
        assert not [word for word in rest if word.startswith("-")], line


def test_every_key_of_the_configuration_has_a_meaning() -> None:
    assert re.findall(r"^\| (`[^`]+`) \|[^|]*\|[^|]*\|\s*\|$", text("docs/configuration.md"), re.MULTILINE) == []


def test_every_page_is_in_the_table_of_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", text("README.md")))
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def test_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 200


def test_figures_in_the_readme_are_those_of_the_benchmarks() -> None:
    assert quoted(text("README.md"), ROOT) == text("README.md"), "run: python -m tools.quote_figures"
    files = set(re.findall(r"`(benchmarks/\w+\.json)`", text("README.md")))
    assert files >= {f"benchmarks/{name}.json" for name in ("learn", "kill_drill", "completions", "drill")}
    assert all((ROOT / file).is_file() for file in files)


def test_figures_are_quoted_with_their_format(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "a.json").write_text(
        json.dumps(
            {
                "ok": True,
                "x": {"y": 1.23456},
                "kills": [1, 2, 3],
                "bytes": 318000,
                "r": {"median": 1, "low": 0.5, "high": 2},
                "floor: z": 0.25,
            }
        )
    )
    row = "| name | see benchmarks/a.json | `benchmarks/a.json` `{}` | |"
    cases = (
        ("ok", "yes"),
        ("x.y:.3f", "1.235"),
        ("kills:len", "3"),
        ("bytes:,d", "318,000"),
        ("r:.1f", "1.0 (0.5 to 2.0)"),
        ("floor: z", "0.25"),
        ("floor: z:.1f", "0.2"),
    )
    for key, shown in cases:
        assert quoted(row.format(key), tmp_path) == row.format(key).replace("see benchmarks/a.json", shown)
    assert quoted(row.replace("a.json", "absent.json").format("x"), tmp_path).count("see benchmarks/absent.json") == 1
    with pytest.raises(KeyError):
        figure(tmp_path, "benchmarks/a.json", "x.z", None)
    with pytest.raises(ValueError, match="would stay as it is"):
        quoted("| name | 1 | of `benchmarks/a.json` `ok` | |", tmp_path)


def test_the_check_of_figures_is_a_command() -> None:
    command = [sys.executable, "-m", "tools.quote_figures", "--check"]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == 0


def test_the_completions_in_the_readme_are_those_that_were_judged() -> None:
    completions = json.loads(text("benchmarks/completions.json"))["completions"]
    shown = re.findall(r"^```python\n(.*?)^```$", text("README.md"), flags=re.MULTILINE | re.DOTALL)
    assert len(shown) == 3
    assert {block.rstrip() for block in shown} <= {(one["prompt"] + one["text"]).rstrip() for one in completions}
