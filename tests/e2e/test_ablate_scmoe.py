"""The quality ablation: a tiny campaign of two variants and two seeds, stopped and gone on with, and its sums by numpy."""

import json
from pathlib import Path

import numpy as np
import pytest

from moetrain.base.errors import MoetrainError
from tests.e2e.jobs import SMALL
from tools.ablate_scmoe import AGAINST, SHARED, SIZE, TOP_2, VARIANTS, Result, config_of, main, summary, table
from tools.campaign import Campaign
from tools.seeds import interval

PAIRED = [TOP_2, "DGMoE"]


def arguments(folder: Path, corpus: Path, *seeds: str, tokens: int = 3072) -> list[str]:
    smaller = [*SMALL, f"data.corpora.0.path={corpus}", "train.global_batch_tokens=1024", "telemetry.console=off"]
    places = ["--folder", str(folder), "--json", str(folder / "all.json"), "--png", str(folder / "all.png")]
    return ["--variants", *PAIRED, "--seeds", *seeds, "--tokens", str(tokens), "--jobs", "1", *places, "--", *smaller]


def test_a_stopped_campaign_goes_on_where_it_was_and_sums_up_seed_by_seed(tmp_path, corpus, capsys):
    results = Campaign(tmp_path, [], 1)
    half_made = results.file("DGMoE-2").with_suffix(".run")
    half_made.mkdir()
    (half_made / "metrics.jsonl").write_text("torn")
    main(arguments(tmp_path, corpus, "1", "2"))
    first = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*-[12].json")}
    assert len(first) == 4
    assert not half_made.exists()

    kept, lost = results.file(f"{TOP_2}-1"), results.file("DGMoE-2")
    changed = first[kept.name]["result"] | {"loss": 9.0}  # a run made again would not find this loss
    kept.write_text(json.dumps(first[kept.name] | {"result": changed}))
    lost.unlink()
    capsys.readouterr()
    main(arguments(tmp_path, corpus, "1", "2"))
    record = json.loads((tmp_path / "all.json").read_text())
    loss = {(run["variant"], run["seed"]): run["loss"] for run in record["runs"]}
    assert loss[TOP_2, 1] == 9.0
    assert json.loads(lost.read_text()) == first[lost.name], "the same variant and seed give the same bits again"

    apart = np.array([loss["DGMoE", seed] - loss[TOP_2, seed] for seed in (1, 2)])
    half = 12.7062 * apart.std(ddof=1) / np.sqrt(2)
    found = record["variants"]["DGMoE"]["against"][TOP_2]
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([apart.mean(), apart.mean() - half, apart.mean() + half])
    assert record["variants"][TOP_2]["against"] == {}
    assert record["variants"]["DGMoE"]["clash"]["mean"] == 0, "distinct experts never clash"
    assert table(record["variants"]) in capsys.readouterr().out
    assert (tmp_path / "all.png").stat().st_size > 10_000

    with pytest.raises(MoetrainError, match="other settings"):
        main(arguments(tmp_path, corpus, "1", "2", tokens=4096))


def test_intervals_are_those_of_students_t():
    values = np.array([4.1, 4.3, 4.2, 4.0])
    half = 3.1824 * values.std(ddof=1) / 2
    assert interval(values.tolist()) == pytest.approx({"mean": 4.15, "low": 4.15 - half, "high": 4.15 + half})


def test_variants_cost_what_top_2_does_but_for_the_gates_and_top_1():
    configs = {variant: config_of(variant, list(SIZE)) for variant in VARIANTS}
    rows = summary([Result(variant, seed, 4.0 + seed, 2.0, None) for variant in VARIANTS for seed in (1, 2)], configs)
    flops = {variant: row["flops_per_token"] / rows[TOP_2]["flops_per_token"] for variant, row in rows.items()}
    assert flops.pop("top-1") < 0.9
    assert all(abs(ratio - 1) < 0.005 for ratio in flops.values())
    assert len({repr(config.model) for config in configs.values()}) == len(VARIANTS) == 17
    assert rows["DGMoE-Share"]["parameters"]["total"] < rows["DGMoE"]["parameters"]["total"]
    assert rows["DGMoE"]["against"][SHARED] == {"mean": 0, "low": 0, "high": 0}
    assert len({len(line.split("|")) for line in table(rows).splitlines()}) == 1
    assert set(AGAINST) <= set(VARIANTS)
