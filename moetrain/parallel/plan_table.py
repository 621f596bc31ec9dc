"""A plan as tables for a terminal."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from moetrain.parallel.plan import Plan
from moetrain.telemetry.format import quantity, share, size

USUAL_BYTES = 14  # a parameter of what is usually saved: bfloat16 weight, float32 master, two moments


def render(plan: Plan, name: str) -> Group:
    """The whole plan of run `name`; notes come last, in red: the run cannot start like this."""
    tables = [
        _table(f"{name} on {_count(plan.axes.world, 'rank')}", _axes(plan)),
        _table("Model", _model(plan)),
        _table("Memory of the fullest rank", _memory(plan)),
        _table("Traffic and checkpoints", _bytes(plan)),
    ]
    return Group(*tables, *[Text(note, style="red") for note in plan.notes])


def _table(title: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(width=28)
    table.add_column(justify="right", width=12)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    table.add_row("", "", "")
    return table


def _axes(plan: Plan) -> list[tuple[str, str, str]]:
    axes, batch = plan.axes, plan.batch
    fewest, most = plan.experts_per_rank
    experts = f"{_count(most, 'expert') if fewest == most else f'{fewest} or {most} experts'} of a layer on a rank"
    return [
        ("data parallel (dp)", str(axes.dp), "every rank reads its own sequences"),
        ("expert parallel (ep)", str(axes.ep), experts),
        ("copies of an expert (edp)", str(axes.edp), ""),
        ("global batch", quantity(batch.tokens), f"tokens: {batch.sequences} sequences of {batch.seq_len}"),
        ("micro-batch", str(batch.micro_batch_size), f"sequences per rank, {_count(batch.accumulation, 'time')} a step"),
        ("steps", str(plan.num_steps), f"{quantity(plan.num_steps * batch.tokens)} tokens"),
    ]


def _model(plan: Plan) -> list[tuple[str, str, str]]:
    count = plan.parameters
    experts = f"{_count(count.num_banks, 'MoE layer')}, {quantity(count.per_expert)} an expert"
    return [
        ("parameters", quantity(count.total), f"{count.total:,}"),
        ("active per token", quantity(count.active), f"{count.active:,}"),
        ("in experts", quantity(count.expert), experts),
        ("FLOPs per trained token", quantity(plan.training_flops_per_token), "forward and backward"),
    ]


def _memory(plan: Plan) -> list[tuple[str, str, str]]:
    memory = plan.memory
    rows = [
        ("weights", memory.weights, "the masters themselves"),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, "both Adam moments"),
        ("gathered parameters", memory.gathered, "FSDP2: whole blocks in flight"),
        ("bfloat16 copies", memory.copies, "autocast"),
        ("activations", memory.activations, f"estimate, {plan.activation_dtype} inside layers"),
        ("logits", memory.logits, ""),
        ("exchange buffers", memory.exchange, ""),
        ("together", memory.total, "estimate, allocator's reserve aside"),
    ]
    return [(name, size(num_bytes), note) for name, num_bytes, note in rows if num_bytes or name == "together"]


def _bytes(plan: Plan) -> list[tuple[str, str, str]]:
    saved = plan.checkpoint
    of_usual = share(saved.partial / (USUAL_BYTES * plan.parameters.total))
    partial = f"by a rank; {size(saved.partial)} together, {share(saved.partial / saved.full)} ({of_usual} of {USUAL_BYTES} B a parameter)"
    return [
        ("all-to-all per step", size(plan.all_to_all_bytes), "sent by a rank, forward and backward"),
        ("full checkpoint", size(saved.full_per_rank), f"by a rank; {size(saved.full)} together"),
        ("partial checkpoint", size(saved.partial_per_rank), partial),
        ("checkpoints kept", size(saved.stored), "on storage, at most"),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
