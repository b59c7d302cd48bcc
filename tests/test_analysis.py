"""Result files as one table, the margins of the embedded model, and the command line."""

import json

import pytest
from synthetic_runs import result, scores, write

from analysis import margins
from analysis.__main__ import COMMANDS, main
from analysis.results import MACHINE, load


def scored(runs, pruner, pattern, sparsity, accuracy, loss, method="none", seed=0):
    pruned = None if method == "none" else (accuracy - 0.1, loss)
    content = result(method, pruner=pruner, pattern=pattern, sparsity=sparsity, seed=seed, accuracy=accuracy, loss=loss,
                     pruned=pruned or (accuracy, loss))  # fmt: skip
    write(runs, content)


@pytest.fixture
def runs(tmp_path):
    """Three pruners that cost more and more; LoRS wins something back at 0.5 and next to nothing at 2:4."""
    folder = tmp_path / "runs"
    for pruner in ("wanda", "sparsegpt", "magnitude"):
        for rank, sparsity in enumerate((0.5, 0.6, 0.7)):
            scored(folder, pruner, "unstructured", sparsity, 0.7 - 0.1 * rank, 1.0 + 0.1 * rank)
        scored(folder, pruner, "2:4", 0.5, 0.65, 1.1)
    for seed in range(3):
        write(folder, result("lors", pruner="none", sparsity=0.0, seed=seed, accuracy=0.8))
        write(folder, result("lors", seed=seed, accuracy=0.76, pruned=(0.7, 1.0)))
        write(folder, result("lors", pattern="2:4", seed=seed, accuracy=0.66, pruned=(0.65, 1.1)))
    return folder


def test_a_run_has_a_row_for_each_end_state_and_controls_have_one_each(tmp_path):
    write(tmp_path, *(result("lora", seed=seed, states=("adapter", "remasked", "dense")) for seed in range(2)))
    table = load([tmp_path])
    assert sorted(table.method) == ["dense"] + 6 * ["lora"] + ["pruned"]
    lora = table[table.method == "lora"]
    assert lora[lora.headline.astype(bool)].end_state.tolist() == ["adapter", "adapter"]
    assert table.set_index("method").seed.isna()[["dense", "pruned"]].all()
    assert table[table.method == "dense"].accuracy.item() == pytest.approx(80)


def test_a_run_without_training_is_the_control_that_it_scores(tmp_path):
    dense = result("none", pruner="none", sparsity=0.0, accuracy=0.8, loss=0.9)
    write(tmp_path, result("none", accuracy=0.6, loss=1.2), dense)
    write(tmp_path, result("lors"))
    table = load([tmp_path]).set_index("method")
    assert sorted(table.index) == ["dense", "lors", "pruned"]
    assert table.loc["pruned", "key"] == result("none")["key"]


def test_controls_of_another_evaluation_are_rows_of_their_own(tmp_path):
    write(tmp_path, result("lors"), result("lors", config={"eval.limit": 20}, dense=(0.9, 0.9)))
    dense = load([tmp_path]).query("method == 'dense'")
    assert sorted(dense.accuracy.round()) == [80, 90]


def test_nothing_that_a_broken_run_measured_can_reach_a_mean(tmp_path):
    write(tmp_path, result("spp", status="oom"), result("spp", seed=1, status="failed"))
    table = load([tmp_path])
    assert sorted(table.status) == ["failed", "oom"] and sorted(table.method) == ["spp", "spp"]
    measured = ["accuracy", "perplexity", "train_peak", "step_ms", "tokens_per_second", "zeros_kept", "loss_last"]
    assert table[measured].isna().all().all()
    assert (table.trainable == 1000).all() and table.error.str.startswith("OutOfMemoryError: ").all()


def test_a_repeated_run_counts_once_and_the_finished_one_wins(tmp_path):
    late = {"end": "2027-01-01T00:00:00+00:00"}
    write(tmp_path / "first", result("lors", accuracy=0.7))
    write(tmp_path / "again", result("lors", accuracy=0.75, environment=late))
    write(tmp_path / "broken", result("lors", status="failed", environment={"end": "2028-01-01T00:00:00+00:00"}))
    lors = load([tmp_path]).query("method == 'lors'")
    assert lors.accuracy.tolist() == pytest.approx([75])
    write(tmp_path / "elsewhere", result("lors", environment={"device": "another"}))
    assert len(load([tmp_path]).query("method == 'lors'")) == 2


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (20, 0), (0, 20), (30, 10), (500, 5)])
def test_zeros_kept_is_the_share_of_the_old_zeros(tmp_path, lost, gained):
    content = result("lora", states=("dense",))
    content["zeros"] |= {"lost": lost, "gained": gained, "after_merge": 0.5 + (gained - lost) / 1000}
    write(tmp_path, content)
    assert load([tmp_path]).query("method == 'lora'").zeros_kept.item() == pytest.approx(1 - lost / 500)


def test_missing_text_is_none_and_missing_numbers_are_nan(tmp_path):
    content = result("lors", mode="profile")
    write(tmp_path, content)
    row = load([tmp_path]).iloc[0]
    assert row.accuracy_metric is None and row.error is None and row.tasks == {} and row.perplexity != row.perplexity
    assert row.config["adapter"]["r"] == 16 and row.threads == 2


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main(["tables", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: runs={tmp_path}: no result.json below\n"
    (tmp_path / "result.json").write_text("{")
    assert main(["plots", str(tmp_path)]) == 2
    assert "result.json: not a result file" in capsys.readouterr().err
    (tmp_path / "result.json").write_text(json.dumps(result() | {"schema": 99}))
    assert main(["tables", str(tmp_path)]) == 2
    assert "schema 99; this version reads 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert COMMANDS[command].__doc__.splitlines()[0][:30] in " ".join(capsys.readouterr().out.split())


def test_margins_that_hold_and_margins_that_do_not(runs):
    verdicts = {what: (measured, holds) for what, measured, holds in margins.checks(load([runs]))}
    assert verdicts["dense mean at least 30 above chance"][1]
    assert verdicts["wanda 0.7 costs at least 12.0"] == ("30.0", True)
    assert verdicts["LoRS wins back a third of the gap at 0.5, mean over seeds"][0].startswith("0.60")
    assert verdicts["LoRS wins back a third of the gap at 0.5, mean over seeds"][1]
    assert not verdicts["LoRS wins back a third of the gap at 2:4, mean over seeds"][1]


def test_margins_writes_table_and_plot_and_says_whether_all_hold(runs, tmp_path, capsys):
    assert main(["margins", str(runs), "--output", str(tmp_path)]) == 1
    assert "| wanda | 2:4 | lors | 3 |" in (tmp_path / "margins.md").read_text()
    assert (tmp_path / "margins.png").stat().st_size > 1000


def test_a_missing_run_is_named(tmp_path):
    write(tmp_path, result("none", accuracy=0.7, pruned=(0.7, 1.0)))
    with pytest.raises(ValueError, match="no run with prune=wanda at 2:4"):
        list(margins.checks(load([tmp_path])))


def test_the_builder_of_these_tests_writes_what_the_harness_writes():
    import torch
    from omegaconf import OmegaConf

    from lors.harness.result import blank_result

    content = result()
    written = blank_result(OmegaConf.create(content["config"]), content["key"], torch.device("cpu"))
    assert content.keys() == written.keys()
    assert set(MACHINE) <= written["environment"].keys()
    assert scores(0.5, 1.0).keys() == {"tasks", "average", "perplexity"}


def test_values_outside_of_the_key_of_a_run_do_not_tell_rows_apart():
    from analysis.groups import IGNORED, IGNORED_WITHOUT_DATA
    from lors.harness.store import NOT_IN_KEY, NOT_IN_PROFILE_KEY

    assert set(NOT_IN_KEY) <= set(IGNORED)
    assert set(NOT_IN_PROFILE_KEY) <= set(IGNORED_WITHOUT_DATA)
