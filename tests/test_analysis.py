"""Tables from result files: what is read, what is refused, what a margin says."""

import json

import pytest

from analysis import margins, methods
from analysis.results import load

TASKS = ("microworld_boolq", "microworld_arc_easy")


def scores(accuracy: float, loss: float) -> dict:
    task = {"metric": "acc", "value": accuracy, "stderr": 0.01, "n": 600, "version": 1}
    average = {"metric": "acc", "value": accuracy, "stderr": 0.005, "tasks": list(TASKS)}
    return {"tasks": dict.fromkeys(TASKS, task), "average": average, "perplexity": {"loss": loss, "value": 2.7**loss}}


def write(folder, method, pruner, pattern, sparsity, seed, accuracy, pruned=(0.6, 1.2), dense=(0.8, 0.9)):
    key = f"{method}-{pruner}-{pattern}-{sparsity}-{seed}".replace(":", "of")
    result = {
        "key": key,
        "status": "ok",
        "method": method,
        "model": "m",
        "pruner": pruner,
        "pattern": pattern,
        "sparsity": sparsity,
        "seed": seed,
        "end_state": "merged",
        "eval": scores(accuracy, 1.0),
        "baselines": {"dense": scores(*dense), "pruned": scores(*pruned)},
        "variants": {},
        "time": {"step_ms": None if method == "none" else {"p50": 100.0}},
        "memory": {"train_peak": 2**20},
        "parameters": {"trainable": 10},
        "zeros": {"after_merge": sparsity},
    }
    (folder / key).mkdir(parents=True)
    (folder / key / "result.json").write_text(json.dumps(result))


@pytest.fixture
def runs(tmp_path):
    for pruner in ("wanda", "sparsegpt", "magnitude"):
        for rank, sparsity in enumerate((0.5, 0.6, 0.7)):
            values = (0.7 - 0.1 * rank, 1.0 + 0.1 * rank)
            write(tmp_path, "none", pruner, "unstructured", sparsity, 0, values[0], pruned=values)
        write(tmp_path, "none", pruner, "2:4", 0.5, 0, 0.65, pruned=(0.65, 1.1))
    for seed in range(3):
        write(tmp_path, "lors", "none", "unstructured", 0.0, seed, 0.8, pruned=(0.8, 0.9))
        write(tmp_path, "lors", "wanda", "unstructured", 0.5, seed, 0.76, pruned=(0.7, 1.0))
        write(tmp_path, "lors", "wanda", "2:4", 0.5, seed, 0.66, pruned=(0.65, 1.1))
    return tmp_path


def test_margins_that_hold_and_margins_that_do_not(runs):
    verdicts = {what: (measured, holds) for what, measured, holds in margins.checks(load([runs]))}
    assert verdicts["dense mean at least 30 above chance"] == ("80.0 - 37.5", True)
    assert verdicts["wanda 0.7 costs at least 12.0"] == ("30.0", True)
    assert verdicts["LoRS wins back a third of the gap at 0.5, every seed"][0].startswith("0.60")
    assert verdicts["LoRS wins back a third of the gap at 0.5, every seed"][1]
    assert not verdicts["LoRS wins back a third of the gap at 2:4, every seed"][1]


def test_report_writes_table_and_plot_and_says_whether_all_hold(runs, tmp_path):
    assert margins.report(load([runs]), tmp_path) == 1
    assert "| wanda | 2:4 | lors | 3 |" in (tmp_path / "margins.md").read_text()
    assert (tmp_path / "margins.png").stat().st_size > 1000


def test_methods_table_has_one_row_per_method(runs, tmp_path):
    text = methods.table_of(load([runs]))
    assert text.count("| lors |") == 2 and "| lors, on the dense model |" in text
    assert "pruned (wanda 0.5)" in text and "| none |" not in text


def test_no_finished_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no finished result.json"):
        load([tmp_path])


def test_a_missing_run_is_named(runs, tmp_path):
    only = tmp_path / "only"
    write(only, "none", "wanda", "unstructured", 0.5, 0, 0.7)
    with pytest.raises(ValueError, match="no run with prune=wanda at 2:4"):
        list(margins.checks(load([only])))
