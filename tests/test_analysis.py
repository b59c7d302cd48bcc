"""Result files as one table, packed files, bad input, the margins of the embedded model, and the command line."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from synthetic_runs import TARGETS, held_out, result, scores, write

from analysis import claims, compare, margins, tables
from analysis.__main__ import COMMANDS, main
from analysis.parquet_file import PLACES, read_rows, write_rows
from analysis.results import MACHINE, load
from analysis.table_writer import Bold, TextTable, latex, markdown
from harness.files import content_digest
from harness.store import RunStore


def test_a_run_has_a_row_for_each_end_state_and_controls_have_one_each(tmp_path):
    write(tmp_path, *(result("lora", seed=seed, states=("adapter", "remasked", "dense")) for seed in range(2)))
    table = load([tmp_path])
    assert sorted(table.method) == ["dense"] + 6 * ["lora"] + ["pruned"]
    lora = table[table.method == "lora"]
    assert lora[lora.headline.astype(bool)].end_state.tolist() == ["adapter", "adapter"]
    assert table.set_index("method").seed.isna()[["dense", "pruned"]].all()
    assert table[table.method == "dense"].accuracy.item() == pytest.approx(80)


def test_a_run_without_training_is_the_control_that_it_scores_and_other_scoring_is_another_control(tmp_path):
    dense = result("none", pruner="none", sparsity=0.0, accuracy=0.8, loss=0.9)
    write(tmp_path, result("none", accuracy=0.6, loss=1.2), dense, result("lors"))
    table = load([tmp_path]).set_index("method")
    assert sorted(table.index) == ["dense", "lors", "pruned"]
    assert table.loc["pruned", "key"] == result("none")["key"]
    write(tmp_path, result("lors", config={"eval.limit": 20}, dense=(0.9, 0.9)))
    assert sorted(load([tmp_path]).query("method == 'dense'").accuracy.round()) == [80, 90]


def test_nothing_that_a_broken_run_measured_can_reach_a_mean(tmp_path):
    write(tmp_path, result("spp", status="oom"), result("spp", seed=1, status="failed"))
    table = load([tmp_path])
    assert sorted(table.status) == ["failed", "oom"] and sorted(table.method) == ["spp", "spp"]
    measured = ["accuracy", "perplexity", "train_peak", "step_ms", "tokens_per_second", "zeros_kept", "loss_last"]
    assert table[measured].isna().all().all()
    assert (table.trainable == 1000).all() and table.error.str.startswith("OutOfMemoryError: ").all()
    assert table.accuracy_metric.tolist() == [None, None] and table.tasks.tolist() == [{}, {}]


def test_a_repeated_run_counts_once_and_the_finished_one_wins(tmp_path):
    write(tmp_path / "first", result("lors", accuracy=0.7))
    write(tmp_path / "again", result("lors", accuracy=0.75, environment={"end": "2027-01-01T00:00:00+00:00"}))
    write(tmp_path / "broken", result("lors", status="failed", environment={"end": "2028-01-01T00:00:00+00:00"}))
    assert load([tmp_path]).query("method == 'lors'").accuracy.tolist() == pytest.approx([75])
    write(tmp_path / "elsewhere", result("lors", environment={"device": "another"}))
    assert len(load([tmp_path]).query("method == 'lors'")) == 2


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (20, 0), (0, 20), (30, 10), (500, 5)])
def test_zeros_kept_is_the_share_of_the_old_zeros(tmp_path, lost, gained):
    content = result("lora", states=("dense",))
    content["zeros"] |= {"lost": lost, "gained": gained, "after_merge": 0.5 + (gained - lost) / 1000}
    write(tmp_path, content)
    assert load([tmp_path]).query("method == 'lora'").zeros_kept.item() == pytest.approx(1 - lost / 500)


def test_held_out_answers_are_a_ratio_of_sums(tmp_path):
    """Their items have its mean and its error, and a lead that is the same in all answers has no error."""
    losses = [1.0, 2.5, 2.0, 4.0]
    for method, lead in (("lors", 0.0), ("spp", 0.3)):
        content = result(method)
        content["eval"]["held_out"] = held_out([loss + lead for loss in losses])
        write(tmp_path, content)
    lors, spp = (row.answers_items for row in load([tmp_path]).query("seed == 0").itertuples())
    expected = held_out(losses)
    assert lors.mean() == pytest.approx(expected["loss"]) == pytest.approx(np.average(losses, weights=TARGETS))
    assert lors.std(ddof=1) / 2 == pytest.approx(expected["loss_stderr"])
    assert (spp - lors).tolist() == pytest.approx([0.3] * 4)


# ---- packed files


def packed(tmp_path, *results):
    """Folder with run folders of an experiment, and the file that they were packed into."""
    write(tmp_path / "search", *results)
    assert main(["pack", str(tmp_path / "search")]) == 0
    return tmp_path / "search", tmp_path / "search.parquet"


def with_items():
    """A result that has everything, single items too."""
    content = result("lora", states=("adapter", "dense"), support="a" * 64)
    for scores_of in (content["eval"], content["baselines"]["dense"], content["variants"]["dense"]["eval"]):
        for number, task in enumerate(scores_of["tasks"].values()):
            task |= {"correct": f"{number:08b}", "margin": 0.5, "margin_stderr": 0.1, "margins": [0.25, 0.75]}
        scores_of["held_out"] = held_out([1.0, 2.0, 3.0, 4.0])
        scores_of["perplexity"]["losses"] = [1.0, 1.5]
    return content


def test_packed_runs_are_the_runs(tmp_path):
    runs = [with_items(), result("lors"), result("none"), result("spp", status="oom"), result("lors", mode="profile")]
    folder, file = packed(tmp_path, *runs)
    rows = {row["key"]: row for row in read_rows(file)}
    for content in runs:
        row = rows[content["key"]]
        assert (row.pop("steps") is None) == (content["artifacts"]["steps"] is None)
        expected = content | {"config": {k: v for k, v in content["config"].items() if k not in PLACES}}
        del expected["artifacts"]
        assert row == expected
    assert not pd.read_parquet(file).result.str.contains("correct|losses|margins|targets").any()
    from_file = load([file])
    assert list(load([folder]).key) == list(from_file.key) == list(load([tmp_path]).key)  # a run counts once
    (items,) = [row.task_items for row in from_file.itertuples() if row.end_state == "dense"]
    assert items["rte"].tolist() == [0, 0, 0, 0, 0, 0, 0, 100]
    assert set(from_file[from_file.method == "lora"].answers_perplexity) == {held_out([1.0, 2.0, 3.0, 4.0])["value"]}
    shutil.rmtree(folder)
    assert main(["tables", str(file)]) == 0 and (folder / "tables.md").exists()  # in the folder of its name


def test_a_sweep_goes_on_from_unpacked_runs(tmp_path, capsys):
    runs = [with_items(), result("none"), result("spp", status="oom")]
    _, file = packed(tmp_path, *runs)
    assert main(["unpack", str(file), "--output", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").iterdir()
    for content in runs:
        store = RunStore(again / content["key"])
        cfg = SimpleNamespace(save_merged=False, save_base=False, force=False)
        assert (store.finished(cfg) is not None) == (content["status"] == "ok")
        assert store.result()["eval"] == content["eval"]
    assert main(["pack", str(again), "--output", str(tmp_path / "again.parquet")]) == 0
    assert read_rows(tmp_path / "again.parquet") == read_rows(file)
    assert main(["unpack", str(file), "--output", str(tmp_path / "again")]) == 0
    assert "0 of 3 runs written" in capsys.readouterr().out
    file.write_bytes(b"{")
    assert main(["unpack", str(file)]) == 2 and capsys.readouterr().err.startswith(f"error: {file}: damaged")


def test_a_stranger_reads_a_packed_file_with_pandas(tmp_path):
    environment = {"git_dirty": True, "command": ["/home/me/run.py", "seed=1", "runs_root=/home/me/runs"]}
    _, file = packed(tmp_path, result("lors", seed=1, accuracy=0.75, environment=environment))
    row = pd.read_parquet(file).iloc[0]
    assert (row.experiment, row.method, row.sparsity, row.seed, row.status) == ("test", "lors", 0.5, 1, "ok")
    assert (row.commit, row.dirty, row.accuracy_percent, row.zeros_lost) == ("0" * 40, True, 75.0, 0)
    assert json.loads(row.config)["adapter"]["r"] == 16
    assert json.loads(row.environment)["command"] == ["run.py", "seed=1"]
    assert pd.DataFrame(list(row.steps)).loss.iloc[-1] == pytest.approx(1.0)


def test_rows_that_are_read_can_be_changed_and_written_whole_or_not_at_all(tmp_path, monkeypatch):
    _, file = packed(tmp_path, with_items())
    (row,) = read_rows(file)
    row["config"]["adapter"] = {"r": 8}
    write_rows(file, [row])
    assert read_rows(file) == [row]
    with pytest.raises(ValueError, match="cannot be written"):
        write_rows(file, [row | {"seed": "one"}])

    def full_disk(table, stream, **_):
        stream.write(b"PAR1")
        raise OSError("no space left")

    monkeypatch.setattr("pyarrow.parquet.write_table", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_rows(file, [])
    assert read_rows(file) == [row] and sorted(entry.name for entry in tmp_path.iterdir()) == ["search", file.name]


def test_every_experiment_gets_a_file_and_repetitions_under_way_are_left_out(tmp_path, capsys):
    write(tmp_path / "a", result("lors"))
    write(tmp_path / "b", result("lora"), result("spp"))
    write(tmp_path / "b" / result("lora")["key"] / ".repeat", result("sqft"))
    assert main(["pack", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.parquet'}: 1 runs\n{tmp_path / 'b.parquet'}: 2 runs\n"
    assert main(["pack", str(tmp_path), "--output", str(tmp_path / "c.parquet")]) == 2
    assert "--output: for a single experiment, and here are 2: a, b" in capsys.readouterr().err


def test_a_torn_last_line_of_the_steps_is_left_out_and_any_other_damaged_one_is_an_error(tmp_path, capsys):
    content = result("lors")
    write(tmp_path / "a", content)
    file = tmp_path / "a" / content["key"] / "steps.jsonl"
    file.write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert main(["pack", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err == f"warning: {file}: the last line is torn and left out\n"
    (row,) = read_rows(tmp_path / "a.parquet")
    assert [(step["step"], step["loss"]) for step in row["steps"]] == [(1, None), (2, 0.5)]
    for line in ("[]", '{"step": 2}', '{"step": 2, "loss": "low"}', "\0\0"):
        file.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 3, "loss": null}}\n')
        assert main(["pack", str(tmp_path / "a")]) == 2
        assert capsys.readouterr().err == f"error: {file}: line 2 is damaged\n"


def test_tables_count_the_runs_of_a_changed_tree_and_of_several_experiments(tmp_path):
    write(tmp_path / "a", result("lora", states=("adapter", "dense"), environment={"git_dirty": True}), result("lors"))
    write(tmp_path / "a", result("lora", sparsity=0.7), result("lors", sparsity=0.7))
    again = result("lors")
    again["config"]["name"] = "other"
    write(tmp_path / "b", again)
    assert main(["tables", str(tmp_path)]) == 0
    text = (tmp_path / "tables.md").read_text()
    note = "1 of 3 runs with changes that were not committed."  # one of the three scored the dense model
    assert text.count(f"\n{note} 1 of 3 runs belong to more than one experiment (other, test).") == 1
    assert text.count(f"0.5: {note}") == 1, "of the averages"


# ---- bad input


@pytest.mark.parametrize(
    ("command", "content"),
    [
        *((command, b"{") for command in sorted(set(COMMANDS) - {"bench", "agreement", "unpack"})),
        *(("tables", content) for content in (b"", b"[]", b'{"key": "a", "status": "ok"}', b"\xff\x00")),
    ],
)
def test_a_damaged_result_is_one_line_that_names_it(tmp_path, capsys, content, command):
    write(tmp_path, result("lors"))
    file = tmp_path / "damaged" / "result.json"
    file.parent.mkdir()
    file.write_bytes(content)
    assert main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and error.count("\n") == 1


def test_no_runs_another_schema_a_file_of_another_kind_and_a_changed_result_are_one_line(tmp_path, capsys):
    def error_of(*places):
        assert main(["tables", *map(str, places)]) == 2
        return capsys.readouterr().err

    assert error_of(tmp_path) == f"error: runs={tmp_path}: no result.json and no packed file (.parquet) below\n"
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result() | {"schema": 99}))
    assert "schema 99; this version reads 1" in error_of(tmp_path)
    content = result()
    file.write_text(json.dumps(content | {"sha256": content_digest(content)}))
    assert len(load([tmp_path]).query("method == 'lors'")) == 1
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1', 1))
    assert str(file) in error_of(tmp_path)
    (tmp_path / "notes.txt").write_text("no runs")
    assert error_of(tmp_path / "notes.txt").startswith(f"error: {tmp_path / 'notes.txt'}: ")


def foreign(content):
    stream = io.BytesIO()
    pd.DataFrame({"key": ["a"]}).to_parquet(stream)
    return stream.getvalue()


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-100], lambda content: b"x", foreign])
def test_a_damaged_or_foreign_packed_file_is_one_line_that_names_it(tmp_path, capsys, damage):
    folder, file = packed(tmp_path, *(result("lors", seed=seed) for seed in range(5)))
    shutil.rmtree(folder)
    file.write_bytes(damage(file.read_bytes()))
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and error.count("\n") == 1
    assert ("its columns are not those of packed runs" in error) == (damage is foreign)


def test_a_changed_byte_of_a_packed_file_is_damage(tmp_path):
    _, file = packed(tmp_path, *(result("lors", seed=seed) for seed in range(5)))
    content, columns = file.read_bytes(), pq.read_metadata(file).row_group(0)
    for column in map(columns.column, range(columns.num_columns)):
        place = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=f"^{file}: "):
            read_rows(file)


NUMBERS = ("sparsity", "seed", "parameters.trainable", "time.step_ms.p50", "zeros.lost", "loss.first")
NUMBERS += ("eval.average.value", "environment.threads", "environment.git_dirty")
NUMBERS += ("config.adapter.r", "config.train.learning_rate")
OTHERS = ("status", "mode", "error", "end_state", "memory.kind", "variants.dense.zeros", "baselines.dense")
TEXTS = ("support.sha256", "environment.end", "environment.git_commit", "eval.tasks.rte.metric")
TEXTS += ("config.name", "config.method.name", "config.model.path")


@pytest.mark.parametrize("place", (*NUMBERS, *OTHERS, *TEXTS))
def test_a_result_edited_by_hand_is_refused_with_one_line_that_names_the_field(tmp_path, place):
    for value in ("missing", [1], *(["1"] if place not in TEXTS else [])):
        edit(tmp_path, place, value)
        with pytest.raises(ValueError, match=rf"^{tmp_path}/result.json: .*{place}[^\n]*$"):
            load([tmp_path])


@pytest.mark.parametrize("place", ["config.prune.samples", "config.eval.tasks", "eval.perplexity.tokens"])
def test_what_no_command_reads_may_be_anything(tmp_path, place):
    edit(tmp_path, place, ["x", {"y": None}])
    table = load([tmp_path])
    assert tables.build(table) and claims.judge_all(table) and compare.compare(table)


def edit(folder, place, value):
    """Write a result that has another value at a place, or none."""
    *parents, last = place.split(".")
    node = content = with_items()
    for parent in parents:
        node = node[parent]
    node.pop(last) if value == "missing" else node.update({last: value})
    (folder / "result.json").write_text(json.dumps(content))


def test_a_packed_row_edited_by_hand_is_refused_with_one_line_that_names_it(tmp_path, capsys):
    folder, file = packed(tmp_path, result("lors"))
    shutil.rmtree(folder)
    for column, value in (("config", '{"name": 1}'), ("config", "[]"), ("result", "{}"), ("items", "x"), ("key", None)):
        table = pq.read_table(file)
        rows = [row | {column: value} for row in table.to_pylist()]
        edited = tmp_path / "edited.parquet"
        pq.write_table(table.from_pylist(rows, schema=table.schema), edited)
        assert main(["tables", str(edited)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {edited}") and error.count("\n") == 1


# ---- the command line, margins, and what the tests rest on


def test_margins_that_hold_margins_that_do_not_and_a_missing_run(tmp_path, capsys):
    """Three pruners that cost more and more; LoRS wins something back at 0.5 and next to nothing at 2:4."""
    folder = tmp_path / "runs"
    for pruner in margins.PRUNERS:
        for label, accuracy, loss in ((0.5, 0.7, 1.0), (0.6, 0.6, 1.1), (0.7, 0.5, 1.2), ("2:4", 0.65, 1.1)):
            zeros = {"pattern": label} if label == "2:4" else {"sparsity": label}
            write(folder, result("none", pruner=pruner, accuracy=accuracy, loss=loss, **zeros))
    with pytest.raises(ValueError, match="no run with prune=none at 0 for lors"):
        list(margins.checks(load([folder])))
    for seed in range(3):
        write(folder, result("lors", pruner="none", sparsity=0.0, seed=seed, accuracy=0.8))
        write(folder, result("lors", seed=seed, accuracy=0.76, pruned=(0.7, 1.0)))
        write(folder, result("lors", pattern="2:4", seed=seed, accuracy=0.66, pruned=(0.65, 1.1)))
    verdicts = {what: (measured, holds) for what, measured, holds in margins.checks(load([folder]))}
    assert verdicts["dense mean at least 30 above chance"][1]
    assert verdicts["wanda 0.7 costs at least 12.0"] == ("30.0", True)
    assert verdicts["LoRS wins back a third of the gap at 0.5, mean over seeds"][0].startswith("0.60")
    assert verdicts["LoRS wins back a third of the gap at 0.5, mean over seeds"][1]
    assert not verdicts["LoRS wins back a third of the gap at 2:4, mean over seeds"][1]
    assert main(["margins", str(folder), "--output", str(tmp_path)]) == 1
    assert "| wanda | 2:4 | lors | 3 |" in (tmp_path / "margins.md").read_text()


def test_the_builder_of_these_tests_writes_what_the_harness_writes():
    import torch
    from omegaconf import OmegaConf

    from analysis.groups import IGNORED, IGNORED_WITHOUT_DATA
    from harness.identity import NOT_IN_KEY, NOT_IN_PROFILE_KEY
    from harness.perplexity import _summary
    from harness.result import blank_result

    content = result()
    written = blank_result(OmegaConf.create(content["config"]), content["key"], {}, torch.device("cpu"))
    assert content.keys() == written.keys()
    assert set(MACHINE) <= written["environment"].keys()
    assert scores(0.5, 1.0).keys() == {"tasks", "average", "perplexity", "held_out"}
    losses = [1.0, 2.5, 2.0, 4.0]
    for name, value in _summary(losses, list(TARGETS)).items():
        assert held_out(losses)[name] == pytest.approx(value)
    # What is outside of the key of a run tells no rows apart.
    assert set(NOT_IN_KEY) <= set(IGNORED) and set(NOT_IN_PROFILE_KEY) <= set(IGNORED_WITHOUT_DATA)


def test_a_table_in_markdown_and_latex():
    rows = [["1", "2:4", Bold("1,000.5"), "-"], ["1", "", "-", "3 ± 1"]]
    table = TextTable(["method", "r|s_t", "n", "peak"], rows, controls=1)
    assert markdown(table).splitlines() == [
        "| method | r\\|s_t | n | peak |",
        "| --- | --- | ---: | ---: |",
        "| 1 | 2:4 | **1,000.5** | - |",
        "| 1 | - | - | 3 ± 1 |",
    ]
    assert markdown(TextTable(["a"], [])) == "None."
    lines = latex(table, "Sizes").splitlines()
    body = lines[lines.index(r"\toprule") + 1 : lines.index(r"\bottomrule")]
    assert body == [
        r"method & r|s\_t & n & peak \\",
        r"\midrule",
        r"1 & 2:4 & \textbf{1,000.5} & - \\",
        r"\midrule",
        r"1 &  & - & 3 $\pm$ 1 \\",
    ]
    assert r"\begin{tabular}{llrr}" in lines and r"\caption{Sizes}" in lines
