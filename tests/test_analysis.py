"""Result files as one table, the margins of the embedded model, and the command line."""

import json
import math

import pytest
from synthetic_runs import result, scores, write

from analysis import margins
from analysis.__main__ import COMMANDS, main
from analysis.results import MACHINE, load, read
from analysis.steps import losses_of


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
    (tmp_path / "result.json").write_text(json.dumps(result() | {"schema": 99}))
    assert main(["tables", str(tmp_path)]) == 2
    assert "schema 99; this version reads 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tables", "plots", "report", "claims", "compare", "lr", "margins", "simulated"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"null", b"7", b'{"key": "a", "status": "ok"}', b"\xff\x00"]
)
def test_a_damaged_result_is_one_line_that_names_it(tmp_path, capsys, content, command):
    write(tmp_path, result("lors"))
    file = tmp_path / "damaged" / "result.json"
    file.parent.mkdir()
    file.write_bytes(content)
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and error.count("\n") == 1


def test_a_result_that_was_changed_after_it_was_written_is_damaged(tmp_path, capsys):
    from harness.store import content_digest

    content = result("lors")
    write(tmp_path, content | {"sha256": content_digest(content)})
    assert len(load([tmp_path]).query("method == 'lors'")) == 1
    file = tmp_path / content["key"] / "result.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1', 1))
    assert main(["tables", str(tmp_path)]) == 2
    assert str(file) in capsys.readouterr().err


def fields(content, path=()):
    """Every field of nested objects, by its path."""
    for name, value in content.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from fields(value, (*path, name))


def several_ends():
    """A result that has everything."""
    return result("lora", states=("adapter", "dense"), support="a" * 64)


def broken(content, path, change):
    """The result without one field, or with a value of another type in it."""
    node, (*parents, last) = content, path
    for name in parents:
        node = node.get(name, {}) if isinstance(node, dict) else {}
    if last in node and change == "missing":
        del node[last]
    elif last in node:
        node[last] = {"text": "x", "list": [1], "object": {"x": []}}[change]
    return content


def loads(file, content):
    """Whether a result can be read; if it cannot, the error is one line that names the file."""
    file.write_text(json.dumps(content))
    try:
        return bool(read(file))
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        return False


# A few of the fields that every table takes.
READ = {"seed", "zeros.lost", "time.step_ms.p50", "eval.average.value", "variants.dense.zeros", "config.train.steps"}


@pytest.mark.parametrize("change", ["missing", "text", "list", "object"])
def test_a_field_that_is_missing_or_of_another_type_is_one_line_or_no_matter(tmp_path, monkeypatch, change):
    monkeypatch.setattr("analysis.plots.draw", lambda *_, **__: ([], []))
    paths = list(fields(several_ends()))
    idle = [path for path in paths if loads(tmp_path / "result.json", broken(several_ends(), path, change))]
    assert idle and not READ & {".".join(path) for path in idle}
    content = several_ends()
    for path in idle:
        broken(content, path, change)
    assert loads(tmp_path / "result.json", content)
    assert main(["report", str(tmp_path)]) == 0


def torn(folder, *lines):
    content = result("lors")
    write(folder, content)
    file = folder / content["key"] / "steps.jsonl"
    file.write_text("".join(lines))
    return file


def test_a_torn_last_line_of_the_steps_is_left_out_and_said_once(tmp_path, capsys):
    file = torn(tmp_path, *(f'{{"step": {step}, "loss": {1 / step}}}\n' for step in range(1, 5)), '{"step": 5, "lo')
    assert losses_of(file) == [(step, pytest.approx(1 / step)) for step in range(1, 5)]
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"warning: {file}: the last line is torn and left out\n"


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"step": 2}', '{"step": 2, "loss": "low"}', "\0\0"])
@pytest.mark.parametrize("command", ["plots", "report"])
def test_another_damaged_line_is_an_error_that_names_it(tmp_path, capsys, line, command):
    file = torn(tmp_path, '{"step": 1, "loss": 2.0}\n', f"{line}\n", '{"step": 3, "loss": null}\n')
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {file}: line 2 is damaged\n"


def test_a_step_without_a_loss_and_a_run_without_steps(tmp_path):
    file = torn(tmp_path, '{"step": 1, "loss": null}\n')
    ((step, loss),) = losses_of(file)
    assert step == 1 and math.isnan(loss)
    assert losses_of(tmp_path / "none") == losses_of(None) == []


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

    from harness.result import blank_result

    content = result()
    written = blank_result(OmegaConf.create(content["config"]), content["key"], torch.device("cpu"))
    assert content.keys() == written.keys()
    assert set(MACHINE) <= written["environment"].keys()
    assert scores(0.5, 1.0).keys() == {"tasks", "average", "perplexity"}


def test_values_outside_of_the_key_of_a_run_do_not_tell_rows_apart():
    from analysis.groups import IGNORED, IGNORED_WITHOUT_DATA
    from harness.identity import NOT_IN_KEY, NOT_IN_PROFILE_KEY

    assert set(NOT_IN_KEY) <= set(IGNORED)
    assert set(NOT_IN_PROFILE_KEY) <= set(IGNORED_WITHOUT_DATA)
