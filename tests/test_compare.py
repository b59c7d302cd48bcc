"""Our numbers beside the published ones: what is matched, what is refused and why, and that nothing is lost."""

import csv

import pytest
from synthetic_runs import SEVEN, result, write

from analysis import compare
from analysis.__main__ import main
from analysis.results import load

LOG = "LoRS authors, development log (not a paper table)"


@pytest.fixture(scope="module")
def numbers():
    return compare.published()


def comparison(folder, *results):
    write(folder, *results)
    return compare.compare(load([folder]))


def llama(method="none", *, seed=0, config=None, **changes):
    """Llama-2-7B is recognised by its name on the Hub."""
    path = {"model.path": "/models/Llama-2-7b-hf"}
    return result(method, model="hf", pattern="2:4", seed=seed, config=path | (config or {}), **changes)


def matched(found, **wanted):
    return [row for row in found.matched if wanted.items() <= row.number.items()]


def test_the_curated_numbers_are_all_there_and_every_dropped_one_has_a_reason():
    kept, dropped = (
        list(csv.DictReader((compare.PUBLISHED / f"{name}.csv").open())) for name in ("numbers", "dropped")
    )
    text = (compare.PUBLISHED / "README.md").read_text()
    assert f"holds {len(kept)} published numbers, `dropped.csv` the {len(dropped)} that" in text
    assert f"together\n{len(kept) + len(dropped)}," in text
    reasons = [row["why"] for row in dropped]
    assert all(f"| {reasons.count(reason)} | {reason} |" in text for reason in reasons)
    from_log = [row for row in kept if row["paper"] == LOG]
    assert f"group ({len(from_log)} of those kept)" in text
    assert all(row["model"] and row["method"] and row["metric"] and row["source"] for row in kept)
    assert all(row["value"] == "OOM" or float(row["value"]) > 0 for row in kept)
    assert all(row["context"] for row in kept if row["metric"] == "perplexity" and "not stated" not in row["table"] and
               row["paper"] == LOG)  # fmt: skip


def test_scores_are_per_cent_and_the_mean_of_seven_tasks_is_computed(numbers):
    dense = [row for row in numbers if row["model"] == "llama2_7b" and row["method"] == "dense" and row["paper"] == LOG]
    values = {(row["task"], row["metric"]): row["value"] for row in dense}
    assert values["arc_challenge", "acc"] == "43.52" and values["hellaswag", "acc_norm"] == "76"
    assert values["average", "acc"] == "59.72"
    mean = next(row for row in dense if (row["task"], row["metric"]) == ("average", "acc"))
    assert mean["task_set"] == "+".join(sorted(SEVEN)) and "mean" in mean["note"]


def test_the_embedded_model_and_failed_runs_match_nothing(tmp_path, numbers):
    found = comparison(tmp_path, result("lors"), result("none"), llama("spp", status="oom"))
    assert not found.matched and not found.other_protocol
    assert len(found.missing) == len(numbers)
    assert {reason for _, reason in found.missing} == {"no run of this model"}


def test_llama_results_stand_beside_the_authors_log(tmp_path):
    found = comparison(tmp_path, llama(accuracy=0.5, loss=2.5, pruned=(0.5, 2.5)))
    (row,) = matched(found, method="pruned", pruner="wanda", metric="perplexity", table="llama2-7b.txt")
    assert row.mean == pytest.approx(12.1825, abs=1e-3) and row.cells["n"] == "1"
    assert row.difference == pytest.approx(12.1825 - 12.3604, abs=1e-3)
    (average,) = matched(found, method="pruned", pruner="wanda", task="average", metric="acc")
    assert average.number["value"] == "48.73" and average.difference == pytest.approx(1.27)
    tasks = {row.number["task"] for row in matched(found, method="dense", metric="acc")}
    assert tasks == {*SEVEN, "average"}


def test_acc_is_never_compared_with_acc_norm(tmp_path):
    found = comparison(tmp_path, llama(accuracy=0.5, pruned=(0.5, 2.5)))
    by_metric = {
        m: matched(found, method="pruned", pruner="wanda", task="hellaswag", metric=m) for m in ("acc", "acc_norm")
    }
    assert [(row.number["value"], round(row.mean, 6)) for row in by_metric["acc"]] == [("41.21", 50.0)]
    assert [(row.number["value"], round(row.mean, 6)) for row in by_metric["acc_norm"]] == [("54.94", 60.0)]


@pytest.mark.parametrize(
    ("change", "metric", "said"),
    [
        ({"eval.add_bos_token": True}, "acc", "bos: true here, false there"),
        ({"eval.limit": 100}, "acc", "items: first 100 here, all there"),
        ({"prune.sequence_length": 4096}, "perplexity", "calibration: 128x4096 here, 128x2048 there"),
    ],
)
def test_another_protocol_is_named_and_not_compared(tmp_path, change, metric, said):
    found = comparison(tmp_path, llama(config=change))
    assert not matched(found, method="pruned", paper=LOG, metric=metric)
    rows = [row for row in found.other_protocol if row.number["method"] == "pruned" and row.number["metric"] == metric]
    assert any(said in row.differs for row in rows) and all(row.difference is None for row in rows)


def test_perplexities_of_other_windows_or_of_one_that_is_not_stated_are_not_compared(tmp_path):
    found = comparison(tmp_path, llama(config={"prune.sequence_length": 4096}))
    wanda = [row for row in found.other_protocol if row.number["context"] == "4096" and row.number["pruner"] == "wanda"]
    assert [row.differs for row in wanda] == [["context: 2048 here, 4096 there"]]
    assert not matched(found, context="4096")
    (row,) = [row for row in found.other_protocol if row.number["paper"] == "lm-eval issue thread"]
    assert row.differs == ["context: 2048 here, not stated there"]


def test_fine_tuned_rows_need_the_same_data_rank_and_end_state(tmp_path):
    runs = [llama("lora", seed=seed, accuracy=0.5 + 0.01 * seed, states=("adapter", "dense")) for seed in range(3)]
    found = comparison(tmp_path, *runs)
    (row,) = matched(found, method="lora", data="alpaca", task="average")
    assert row.cells["ours"] == "51.00 ± 1.00" and row.cells["n"] == "3" and row.ours.key.nunique() == 3
    assert row.cells["recipe"] == "300 steps, lr 0.001"
    other = {row.number["data"]: row.differs for row in found.other_protocol if row.number["method"] == "lora"}
    assert "data: alpaca here, slimpajama there" in other["slimpajama"]
    assert not any(row.number["end_state"] == "dense" for row in found.matched)


def test_seeds_of_different_recipes_are_not_averaged(tmp_path):
    found = comparison(tmp_path, llama("spp"), llama("spp", seed=1, config={"train.learning_rate": 4e-3}))
    rows = matched(found, method="spp", data="alpaca", task="average")
    assert sorted((len(row.ours), row.cells["recipe"]) for row in rows) == [
        (1, "300 steps, lr 0.001"), (1, "300 steps, lr 0.004")
    ]  # fmt: skip


def test_reasons_for_missing_numbers_go_from_coarse_to_fine(tmp_path):
    found = comparison(tmp_path, llama("lora", states=("adapter",)))
    why = {(number["model"], number["pruner"], number["method"]): reason for number, reason in found.missing}
    assert why["llama3_8b", "wanda", "pruned"] == "no run of this model"
    assert why["llama2_7b", "sparsegpt", "pruned"] == "not pruned this way"
    assert why["llama2_7b", "wanda", "spp"] == "method not run"
    mixed = {"metric": "acc_or_acc_norm", "method": "dense", "model": "llama2_7b"}
    assert {reason for number, reason in found.missing if mixed.items() <= number.items()} == {"not scored"}


def test_command_writes_what_it_prints(tmp_path, capsys):
    write(tmp_path / "runs", llama())
    assert main(["compare", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| llama2_7b | wanda 2:4 pruned | average acc (%) | 48.73 | 70.00 | +21.27 | 1 |" in text
    assert "## Published, not measured here" in text and "| llama3_8b | spp | no run of this model |" in text
