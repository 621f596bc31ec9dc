"""The model card: what a folder holds, how to use it, and what is known of its training. Markdown, no torch."""

from collections.abc import Iterable, Mapping

from moetrain.model.config import ModelConfig
from moetrain.model.count import count_parameters
from moetrain.store.bundle import Contents
from moetrain.telemetry.format import quantity

USE = {
    "bundle": """```
moetrain generate {name} --prompt "..."
```""",
    "huggingface": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```""",
}


def model_card(contents: Contents, name: str, form: str) -> str:
    """README.md of a bundle or Hugging Face folder called `name`. form: bundle | huggingface."""
    config, training = ModelConfig.from_dict(contents.config), contents.training
    count = count_parameters(config)
    total, active = parameters(count.total), parameters(count.active)
    kind = "Mixture-of-Experts language model" if config.banks() else "language model"
    lines = [
        *(["---", "library_name: transformers", "tags: [moe, moetrain]", "---"] if form == "huggingface" else []),
        f"# {name}",
        "",
        f"A decoder-only {kind} with {total} parameters, of which {active} are active for each token.",
        "",
        "## Use",
        "",
        USE[form].format(name=name),
        "",
        "## Shape",
        "",
        *table(("", ""), _shape(config, count.total, count.active)),
        "",
        "## Training",
        "",
    ]
    facts = list(_flat({key: value for key, value in training.items() if key != "experts"}))
    lines += table(("", ""), facts) if facts else ["Nothing is recorded."]
    experts = training.get("experts")
    if isinstance(experts, list) and experts:
        lines += ["", "## Experts", "", *_experts(experts)]
    return "\n".join(lines) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Markdown rows."""
    titles = list(head)
    return [_row(titles), _row(["---"] * len(titles)), *(_row(row) for row in rows)]


def parameters(number: int) -> str:
    """30.5B, 3.10M: models are counted in billions, not in G."""
    return quantity(number).replace("G", "B")


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _experts(rows: list[dict[str, object]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = table([column.replace("_", " ") for column in columns], ([row.get(key, "") for key in columns] for row in rows))
    note = "oldest steps: how many steps before this checkpoint the bank's oldest expert was saved (checkpoints are partial)."
    return [*lines, "", note]


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        elif value is not None:
            yield (prefix + key).replace("_", " "), round(value, 4) if isinstance(value, float) else value


def _shape(config: ModelConfig, total: int, active: int) -> list[tuple[str, object]]:
    attention, routing, blocks = config.attention, config.routing, config.blocks()
    kinds = ", ".join(f"{blocks.count(kind)} {kind}" for kind in dict.fromkeys(blocks))
    rows: list[tuple[str, object]] = [
        ("parameters, total", f"{total:,}"),
        ("parameters, active", f"{active:,}"),
        ("layers", config.num_layers),
        ("blocks", kinds),
        ("hidden size", config.hidden_size),
        ("attention heads, key/value heads, head dim", f"{attention.num_heads}, {attention.num_kv_heads}, {attention.head_dim}"),
        ("vocabulary", config.vocab_size),
        ("context", config.max_position),
    ]
    if config.banks():
        rows += [
            ("experts per layer, chosen per token", f"{routing.num_experts}, {routing.top_k}"),
            ("expert FFN size", config.expert_ffn_size),
        ]
    return rows
