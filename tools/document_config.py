"""Writes docs/configuration.md: every key with type, default and meaning, read from the dataclasses and the comments beside their fields.

python tools/document_config.py           writes the page
python tools/document_config.py --check   exits with 1 if the page is not current
"""

import argparse
import ast
import dataclasses
import inspect
import io
import sys
import tokenize
from pathlib import Path
from typing import get_args, get_type_hints

from moetrain.config import TrainConfig, options
from moetrain.config.folder import GROUPS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
<!-- Written by: python tools/document_config.py. Change the dataclasses in moetrain/*/config.py or the files in conf/, not this page. -->
# Configuration

A run is one tree of keys. Their defaults live in dataclasses, one per room; `conf/` holds differences only, as options of groups:

```
torchrun --standalone --nproc-per-node 2 launch/train.py +experiment=gpt_moe_8e optim=wsd optim.lr=2e-3
```

`+experiment=NAME` chooses an experiment (the plus is needed: nothing is chosen by default), `GROUP=OPTION` a file of `conf/GROUP`,
`KEY=VALUE` sets one key and wins. Lists are written `'model.pattern=[dense,moe]'`, nothing is written `null`.

- `--cfg job` prints the composed configuration, `--info defaults` says which files it came from, `--help` lists the options.
- `debug=plan debug.world=64` prints what the run would cost on 64 ranks; `moetrain plan NAME --world 64` does the same.
- A key that does not exist, a value of the wrong type or one that breaks a rule ends the start with one sentence.
- One process group trains one run, so `--multirun` is refused; `launch/submit.py -m` starts one job per value.

**The same run.** A run is resumed by the same command. Its identity is the model, the corpora and the order of samples
(`data.corpora`, `data.seq_len`, `data.document_boundaries`, `data.seed`), `optim`, `train.global_batch_tokens`, `run.seed`,
`engine.dtype`, `checkpoint.init_from` and the hashes of what the corpora hold: when one of these changed, the resume is refused with the
list of changes, unless `checkpoint.allow_changes=true`. Everything else may change from start to start: ranks, `parallel`, micro-batch and
accumulation (they are derived again from the global batch), checkpoints, telemetry. `train.tokens` may
change too: a longer run reads on where the shorter one ended. Its learning-rate schedule is then laid over the new length, and a
log line says so; `optim=constant` has no decay to move.

**Where a start begins.** `checkpoint.resume=PATH` gives a run its first values from another run; from its own first recovery point on it
resumes itself. `never` starts anew and keeps what an earlier run left in the folder as `*.before-N`; a restart of the same job by torchrun
or Slurm goes on. `checkpoint.init_from=BUNDLE` takes weights only, of the same model and tokenizer: write an imported model as an option
with `moetrain config --from-bundle BUNDLE > conf/model/NAME.yaml`, and start with `model=NAME`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, "## Groups and options", "", *groups(), *sections("", TrainConfig)]).rstrip() + "\n"


def groups() -> list[str]:
    lines = []
    for group in GROUPS:
        lines += [f"**{group}**" + (" (writes into `model.routing`)" if group == "routing" else ""), ""]
        lines += ["| option | |", "| --- | --- |"]
        lines += [f"| `{'+' if group == 'experiment' else ''}{group}={name}` | {text} |" for name, text in options(group).items()] + [""]
    return lines


def sections(prefix: str, schema: type) -> list[str]:
    """One table per dataclass, depth first, headed by its key."""
    hints, comments, lines = get_type_hints(schema), field_comments(schema), []
    plain = [item for item in dataclasses.fields(schema) if not dataclasses.is_dataclass(hints[item.name])]
    if plain:
        lines += [f"## `{prefix.rstrip('.')}`", "", inspect.cleandoc(schema.__doc__ or "").split("\n\n")[0], ""]
        lines += ["| key | type | default | |", "| --- | --- | --- | --- |"]
        for item in plain:
            if item.name not in comments:
                raise SystemExit(f"{schema.__name__}.{item.name} has no comment on the line where its default ends: say what it means.")
            meaning = comments[item.name].replace("|", "\\|")
            lines.append(f"| `{prefix}{item.name}` | {type_name(hints[item.name])} | `{default(item)}` | {meaning} |")
        lines.append("")
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            lines += sections(f"{prefix}{item.name}.", hint)
        for inner in get_args(hint):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                lines += sections(f"{prefix}{item.name}[i].", inner)
    return lines


def type_name(hint: object) -> str:
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    text = text.replace("None", "null").replace(" | ", " or ")
    for inner in get_args(hint):
        if dataclasses.is_dataclass(inner):
            return "list of groups"
    return {"str": "word", "list[str]": "list of words", "bool": "true, false"}.get(text, text)


def default(item: "dataclasses.Field[object]") -> str:
    """As YAML writes it."""
    value = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    if isinstance(value, list):
        return f"[{', '.join(map(repr, value))}]"
    return {None: "null", True: "true", False: "false", "": "''"}[value] if value in (None, "") or isinstance(value, bool) else str(value)


def field_comments(schema: type) -> dict[str, str]:
    """Field name -> the comment at the end of its line."""
    source = inspect.getsource(schema)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: comments[node.end_lineno] for node in fields if node.end_lineno in comments}  # pyright: ignore


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes docs/configuration.md from the dataclasses.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not current")
    if parser.parse_args().check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        print("docs/configuration.md is current." if current else "docs/configuration.md is stale: run python tools/document_config.py.")
        return 0 if current else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
