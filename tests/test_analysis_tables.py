"""Tables: which runs share a row and a table, what is bold, what is refused, and the three formats."""

import csv
import io
import math
import re

import pytest
from synthetic_runs import MEBIBYTE, result, scores, write

from analysis.__main__ import main
from analysis.averages import side_by_side
from analysis.groups import flat, groups_of, varying
from analysis.results import load
from analysis.table_parts import Cell
from analysis.tables import build

PRECISE = 0.001  # standard error over the items


def scored(method, accuracy, *, stderr=PRECISE, **options):
    """A result whose scores have a standard error of their own."""
    content = result(method, accuracy=accuracy, **options)
    content["eval"] = scores(accuracy, options.get("loss", 1.0), stderr=stderr)
    return content


def lora(seed, accuracy, **options):
    """A LoRA run: beside the weights, merged and masked again (3 points less), merged with all zeros lost."""
    content = scored("lora", accuracy, seed=seed, states=("adapter", "remasked", "dense"), **options)
    content["zeros"] |= {"after_merge": None, "lost": None, "gained": None, "mergeable": False}
    content["variants"]["remasked"]["eval"] = scores(accuracy - 0.03, 1.0, stderr=PRECISE)
    content["variants"]["dense"]["zeros"] |= {"after_merge": 0.0, "lost": 500, "gained": 0, "mergeable": False}
    return content


def tables_of(folder, *contents, mix=False):
    write(folder, *contents)
    return build(load([folder]), mix=mix)


def row_of(table, label, **choices):
    rows = [row for row in table.rows if row.label == label and choices.items() <= dict(row.choices).items()]
    assert len(rows) == 1, [(row.label, row.choices) for row in table.rows]
    return rows[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Wanda at 0.5: LoRA, LoRS clearly ahead, SPP, the dense control with LoRS; three seeds each."""
    runs = [lora(seed, 0.72 + 0.001 * seed) for seed in range(3)]
    runs += [scored("lors", 0.76 + 0.001 * seed, seed=seed, train_peak=90 * MEBIBYTE) for seed in range(3)]
    runs += [scored("spp", 0.70 + 0.002 * seed, seed=seed, step_ms=(190.0, 200.0, 210.0)) for seed in range(3)]
    runs += [scored("lors", 0.81, seed=seed, pruner="none", sparsity=0.0) for seed in range(3)]
    folder = tmp_path_factory.mktemp("runs")
    write(folder, *runs)
    return folder


@pytest.fixture(scope="module")
def table(runs):
    (only,) = build(load([runs]))
    return only


def test_a_row_for_each_method_and_end_state_between_its_controls(table):
    assert [(row.role, row.label, row.n) for row in table.rows] == [
        ("control", "dense", 0),
        ("control", "dense, fine-tuned (LoRS)", 3),
        ("control", "pruned", 0),
        ("method", "LoRA, with adapter", 3),
        ("method", "LoRA, re-masked", 3),
        ("method", "LoRA, zeros lost", 3),
        ("method", "LoRS", 3),
        ("method", "SPP", 3),
    ]
    assert [row.label for row in table.trainings] == ["LoRA", "LoRS", "SPP"]


def test_cells_are_mean_and_standard_deviation_over_the_seeds(table):
    cell = row_of(table, "SPP").cells["average"]
    assert (cell.mean, cell.std, cell.n) == (pytest.approx(70.2), pytest.approx(0.2), 3)
    columns = {column.name: column for column in (*table.quality, *table.cost)}
    assert cell.text(columns["average"]) == "70.2 ± 0.2"
    assert row_of(table, "dense").cells["average"].text(columns["average"]) == "80.0"
    assert row_of(table, "LoRA, with adapter").cells["zeros_kept_percent"].text(columns["zeros_kept_percent"]) == "-"
    assert row_of(table, "LoRA, zeros lost").cells["zeros_kept_percent"].mean == pytest.approx(0)
    assert columns["boolq"].title == "boolq (acc)" and columns["average"].title == "average (acc)"


def test_costs_and_scores_are_compared_with_lora_as_trained(table):
    cells = row_of(table, "SPP").cells
    assert cells["step_ms_over_lora"].mean == pytest.approx(2) and cells["train_peak_bytes_over_lora"].mean == 1
    assert row_of(table, "LoRS").cells["train_peak_bytes_over_lora"].mean == pytest.approx(0.9)
    assert cells["average_minus_lora"].mean == pytest.approx(-1.9)
    assert row_of(table, "LoRA, re-masked").cells["average_minus_lora"].mean == pytest.approx(-3)
    assert row_of(table, "LoRA, with adapter").cells["step_ms_over_lora"].mean == 1


def test_bold_is_what_beats_every_competitor_beyond_noise(table):
    best = {(row.label, name) for row in table.rows for name, cell in row.cells.items() if cell.best}
    scored_columns = {column.name for column in table.quality if column.better and column.name != "perplexity"}
    assert best == {("LoRS", name) for name in (*scored_columns, "train_peak_bytes")}


def test_controls_and_models_that_lost_zeros_do_not_compete(tmp_path):
    runs = [lora(seed, 0.79 + 0.001 * seed) for seed in range(3)]
    runs += [scored("lors", 0.77 + 0.001 * seed, seed=seed) for seed in range(3)]
    (table,) = tables_of(tmp_path, *runs)
    assert row_of(table, "LoRS").cells["average"].best  # 79.0 of LoRA with zeros lost is more
    assert not row_of(table, "LoRA, zeros lost").cells["average"].best


@pytest.mark.parametrize(("stderr", "seeds"), [(0.02, 3), (PRECISE, 1)], ids=["imprecise items", "one seed"])
def test_nothing_is_bold_within_the_noise(tmp_path, stderr, seeds):
    runs = [scored(m, a + 0.001 * s, seed=s, stderr=stderr)
            for m, a in (("lors", 0.76), ("spp", 0.74)) for s in range(seeds)]  # fmt: skip
    (table,) = tables_of(tmp_path, *runs)
    assert not any(row.cells["average"].best for row in table.rows)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_small_lead_on_the_same_items_shows_where_the_items_are_recorded(tmp_path, recorded):
    """Of 100 items of each task LoRS has 4 or 5 right more than SPP, and none wrong that SPP has right."""
    runs = []
    for method, right in (("lors", 70), ("spp", 66)):
        for seed in range(3):
            count = right + (seed == 0 and method == "lors")
            content = scored(method, count / 100, seed=seed, stderr=0.02)
            if recorded:
                for task in content["eval"]["tasks"].values():
                    task["correct"] = "1" * count + "0" * (100 - count)
            runs.append(content)
    (table,) = tables_of(tmp_path, *runs)
    assert row_of(table, "LoRS").cells["average"].best == recorded
    assert row_of(table, "LoRS").cells["boolq"].best == recorded


def test_runs_that_differ_in_a_choice_are_rows_with_a_column_for_it(tmp_path):
    runs = [result("lors", seed=seed, accuracy=0.7 + 0.001 * r, config={"adapter.r": r, "method.peft.r": r})
            for seed in range(2) for r in (16, 32)]  # fmt: skip
    runs += [result("lora", config={"adapter.r": 32, "method.peft.r": 32}, accuracy=0.6)]
    runs += [result("lors", config={"method.peft.init": "kaiming"})]
    (table,) = tables_of(tmp_path, *runs)
    assert table.choices == {"adapter.r": "r", "method.peft.init": "init"}
    rows = [(row.label, *row.choices.values(), row.n) for row in table.rows if row.role == "method"]
    assert rows == [
        ("LoRA", "32", "-", 1),
        ("LoRS", "16", "gradient", 2),
        ("LoRS", "16", "kaiming", 1),
        ("LoRS", "32", "gradient", 2),
    ]
    # LoRA was run with rank 32 alone, so rank 16 has nothing to be compared with.
    of_lora = {
        row.choices["adapter.r"]: row.cells["step_ms_over_lora"].mean for row in table.rows if row.label == "LoRS"
    }
    assert of_lora["32"] == 1 and of_lora["16"] != of_lora["16"]


def test_a_learning_rate_tuned_for_each_method_is_shown_and_does_not_part_it_from_lora(tmp_path):
    runs = [result("lora"), result("lors", config={"train.learning_rate": 3e-3})]
    (table,) = tables_of(tmp_path, *runs)
    row = row_of(table, "LoRS", **{"train.learning_rate": "0.003"})
    assert row.cells["step_ms_over_lora"].mean == 1


def test_another_protocol_is_another_table(tmp_path):
    runs = [result("lors", mode="profile", config={"train.sequence_length": length}) for length in (2048, 512, 1024)]
    runs += [result("lors"), result("lors", config={"eval.limit": 20}, dense=(0.5, 1.0))]
    tables = tables_of(tmp_path, *runs)
    assert [table.title for table in tables if table.axes["mode"] == "profile"] == [
        f"microworld, sparsity 0.5, random weights, time and memory only, sequence length {length}"
        for length in (512, 1024, 2048)
    ]
    limited = {table.axes.get("eval.limit"): table for table in tables if table.axes["mode"] == "run"}
    assert limited[20].rows[0].cells["average"].mean == pytest.approx(50)
    assert limited[None].rows[0].cells["average"].mean == pytest.approx(80)


def test_simulated_results_never_meet_measured_ones(tmp_path):
    simulated = result("lors", mode="simulate")
    simulated["memory"]["kind"] = "simulated"
    tables = tables_of(tmp_path, simulated, result("lors", mode="profile"), result("lors"))
    assert [table.axes["mode"] for table in tables] == ["profile", "run", "simulate"]
    assert all(len(table.trainings) == 1 for table in tables)
    assert "simulated" in tables[-1].title and any("simulated on fake tensors" in note for note in tables[-1].notes)


@pytest.mark.parametrize("change", [{"device": "another GPU"}, {"torch": "2.11.0"}, {"transformers": "5.17.0"}])
def test_machines_are_mixed_on_demand_and_never_averaged(tmp_path, change, capsys):
    write(tmp_path, result("lors"), result("lors", seed=1, environment=change))
    assert main(["tables", str(tmp_path)]) == 2
    ((name, value),) = change.items()
    assert re.search(rf"{name}: .*{re.escape(value)}.*--mix", capsys.readouterr().err)
    assert main(["tables", "--mix", str(tmp_path)]) == 0
    (table,) = build(load([tmp_path]), mix=True)
    assert [row.n for row in table.trainings] == [1, 1] and list(table.choices) == [name]


def test_other_machines_in_other_tables_are_no_mix(tmp_path):
    other = {"device": "another GPU"}
    tables = tables_of(tmp_path, result("lors"), result("lors", pruner="sparsegpt", environment=other))
    assert len(tables) == 2
    assert all(len([row for row in table.rows if row.method == "dense"]) == 2 for table in tables)  # and no fine-tuned


def test_missing_cells_out_of_memory_and_failures(tmp_path):
    runs = [result("lors"), result("lors", seed=1, status="failed"), result("spp", status="oom")]
    runs += [result("sqft", seed=seed, status="failed") for seed in range(2)]
    (table,) = tables_of(tmp_path, *runs)
    texts = {row.label: [row.cells[column.name].text(column) for column in (table.quality[-4], table.cost[1])]
             for row in table.rows}  # fmt: skip
    assert texts["SPP"] == ["OOM", "OOM"] and texts["SQFT"] == ["-", "-"] and texts["LoRS"] == ["70.0", "100.0"]
    assert texts["dense, fine-tuned"] == ["-", "-"]
    assert row_of(table, "LoRS").n == 1
    assert [line.split(" (")[0] for line in table.failures] == [
        "LoRS, seed 1: failed",
        "SQFT, seed 0: failed",
        "SQFT, seed 1: failed",
        "SPP, seed 0: out of memory",
    ]


def test_models_that_nobody_trained_are_tables_of_controls(tmp_path):
    runs = [result("lors"), result("none", pruner="magnitude", accuracy=0.5, pruned=(0.5, 2.0))]
    first, second = tables_of(tmp_path, *runs)
    assert second.title == "microworld, wanda 0.5" and first.title == "microworld, magnitude 0.5"
    assert [row.label for row in first.rows] == ["dense", "dense, fine-tuned", "pruned"]
    assert first.rows[2].cells["average"].mean == pytest.approx(50) and not first.trainings


def test_a_control_that_scores_differently_shows_that_the_runs_do_not_belong_together(tmp_path):
    runs = [result("lors"), result("lors", seed=1, dense=(0.79, 0.9))]
    (table,) = tables_of(tmp_path, *runs)
    assert [row.label for row in table.rows].count("dense") == 2
    assert table.notes[0] == "The dense model was scored differently: code or data changed between these runs."


def test_the_dense_model_alone_is_a_table(tmp_path):
    (table,) = tables_of(tmp_path, *(result("lors", pruner="none", sparsity=0.0, seed=seed) for seed in range(2)))
    assert [(row.label, row.n) for row in table.rows] == [("dense", 0), ("LoRS", 2)]


def test_one_dead_weight_too_many_does_not_read_as_hundred_percent(tmp_path):
    content = result("lors")
    content["zeros"] |= {"lost": 1, "gained": 0, "after_merge": 0.5 - 1e-6}
    (table,) = tables_of(tmp_path, content)
    column = next(column for column in table.quality if column.name == "zeros_kept_percent")
    assert row_of(table, "LoRS").cells[column.name].text(column) == "99.99"


def test_averages_of_several_tables_stand_side_by_side(tmp_path, capsys):
    levels = ({"sparsity": 0.5}, {"sparsity": 0.7, "dense": (0.81, 0.9)}, {"sparsity": 0.5, "pattern": "2:4"})
    runs = [lora(seed, 0.70 + 0.001 * seed, **level) for level in levels for seed in range(3)]
    runs += [scored("lors", 0.75 + 0.001 * seed, seed=seed, **levels[0]) for seed in range(3)]
    runs += [scored("lors", 0.69, seed=0, **levels[2])]
    write(tmp_path, *runs)
    tables = build(load([tmp_path]))
    (side,) = side_by_side(tables)
    assert side.title == "microworld, wanda, averages"
    of_label = {table.axes["label"]: table for table in tables}
    heads = [column.title for column in side.quality]
    assert heads[:6] == ["0.5", "Δ LoRA", "0.7", "Δ LoRA", "2:4", "Δ LoRA"]
    assert heads[6:] == ["trainable", "memory (MiB)", "GFLOP/step"]
    for label, table in of_label.items():
        for row in side.rows:
            alone = [other for other in table.rows if (other.label, other.method) == (row.label, row.method)]
            for name in ("average", "average_minus_lora"):
                cell = row.cells[f"{name} {label}"]
                wanted = [other.cells[name] for other in alone] or [Cell()]
                assert any(repr(cell) == repr(other) for other in wanted)
    best = row_of(side, "LoRS").cells
    assert best["average 0.5"].best and not best["average 2:4"].best and math.isnan(best["average 0.7"].mean)
    assert row_of(side, "LoRS").n == 1 and len(row_of(side, "LoRS").keys) == 4
    # One dense model was scored differently: both rows are there, each in its column.
    assert sum(row.label == "dense" for row in side.rows) == 2
    assert main(["tables", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("## microworld, wanda, averages") < printed.index("## microworld, wanda 0.5")


def test_every_pair_of_lines_has_its_difference_in_a_file(runs, table, tmp_path, capsys):
    assert main(["tables", str(runs), "--output", str(tmp_path)]) == 0
    pairs = list(csv.DictReader((tmp_path / "differences.csv").open()))
    scored_rows = [row for row in table.rows if not math.isnan(row.cells["average"].mean)]
    assert len(pairs) == len(scored_rows) * (len(scored_rows) - 1) / 2 and {pair["table"] for pair in pairs} == {
        table.title
    }
    (pair,) = [pair for pair in pairs if {pair["a"], pair["b"]} == {"LoRS", "SPP"}]
    assert pair["a"] == "LoRS" and pair["n"] == "3" and 0 < float(pair["p"]) < 0.01
    means = [row_of(table, name).cells["average"].mean for name in ("LoRS", "SPP")]
    assert float(pair["difference"]) == pytest.approx(means[0] - means[1], rel=1e-3)
    lora = row_of(table, "LoRS").cells["average_minus_lora"]
    (pair,) = [pair for pair in pairs if (pair["a"], pair["b"]) == ("LoRS", "LoRA, with adapter")]
    assert float(pair["error"]) == pytest.approx(lora.std, rel=1e-3)


def test_one_table_has_nothing_beside_it(runs):
    assert side_by_side(build(load([runs]))) == []


def test_three_formats_say_the_same(runs, table, tmp_path, capsys):
    assert main(["tables", str(runs), "--output", str(tmp_path / "out")]) == 0
    markdown, latex, comma = ((tmp_path / "out" / f"tables.{end}").read_text() for end in ("md", "tex", "csv"))
    assert capsys.readouterr().out.strip() == markdown.strip()
    header = next(line for line in markdown.splitlines() if line.startswith("| method | n | boolq"))
    lors = next(line for line in markdown.splitlines() if line.startswith("| LoRS | 3 |"))
    assert header.count("|") == lors.count("|") and "**76.1 ± 0.1**" in lors
    assert r"\textbf{76.1 $\pm$ 0.1}" in latex and r"zeros kept (\%)" in latex and r"$\Delta$ LoRA" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\begin{tabular}") == 2
    columns = [line.count("&") for line in latex.splitlines() if line.endswith(r"\\")]
    assert set(columns) == {header.count("|") - 2, len(table.cost) + 1}
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(comma))}
    assert rows["LoRS"]["average_best"] == "1" and rows["SPP"]["average_best"] == "0"
    assert float(rows["LoRS"]["average"]) == pytest.approx(76.1) and rows["LoRS"]["n"] == "3"
    assert rows["pruned"]["step_ms"] == "-" and len(rows["LoRS"]["runs"].split()) == 3


def test_varying_compares_within_a_method_and_ignores_what_repeats_the_adapter():
    lors = {"method": {"name": "lors", "peft": {"r": 16, "init": "gradient"}}, "adapter": {"r": 16}, "seed": 0}
    spp = {"method": {"name": "spp", "peft": {"r": 16, "init": "zero"}}, "adapter": {"r": 16}, "seed": 1}
    wide = {"method": {"name": "spp", "peft": {"r": 32, "init": "zero"}}, "adapter": {"r": 32}, "seed": 1}
    assert varying([flat(lors), flat(spp)]) == []
    assert varying([flat(lors), flat(spp), flat(wide)]) == ["adapter.r"]
    assert varying([flat(lors), flat(lors) | {"train.new": 1}]) == ["train.new"]


def test_a_seed_of_a_method_is_a_choice_only_if_it_is_not_that_of_the_run(tmp_path):
    def rows(folder, *own_seeds):
        configs = [{"method.peft.seed": own} for own in own_seeds]
        write(folder, *(result("xgblora", seed=seed, config=config) for seed, config in enumerate(configs)))
        (table,) = build(load([folder]))
        return [row.n for row in table.rows if row.role == "method"]

    assert rows(tmp_path / "follows", 0, 1, 2) == [3]
    assert rows(tmp_path / "fixed", 7, 7, 7) == [3]
    assert rows(tmp_path / "apart", 0, 0, 7) == [2, 1]


def came_sparse(seed=0, method="lors", support="a" * 64, **options):
    """A run of a model that came with zeros: nothing pruned it, and from what it was made nobody knows."""
    content = result(method, pruner="none", seed=seed, support=support, **options)
    content["baselines"]["dense"] = None
    return content


def test_a_model_that_came_sparse_is_a_table_of_its_own_and_no_dense_control(tmp_path):
    folder = {"model.path": "/models/sparse"}
    runs = [came_sparse(seed, accuracy=0.7 + 0.001 * seed, config=folder) for seed in range(2)]
    runs += [came_sparse(method="none", accuracy=0.6, loss=1.2, config=folder)]
    runs += [result("lors"), result("lors", pruner="none", sparsity=0.0, accuracy=0.81)]
    pruned, sparse = sorted(tables_of(tmp_path, *runs), key=lambda table: table.axes["pruner"] == "none")
    assert [(row.label, row.n) for row in sparse.rows] == [("pruned", 0), ("LoRS", 2)]
    assert sparse.title.startswith("microworld, came with zeros, 0.5") and sparse.axes["sparsity"] == 0.5
    assert row_of(sparse, "pruned").cells["average"].mean == pytest.approx(60)
    assert [(row.label, row.n) for row in pruned.rows] == [
        ("dense", 0), ("dense, fine-tuned (LoRS)", 1), ("pruned", 0), ("LoRS", 1)
    ]  # fmt: skip
    dense = row_of(pruned, "dense, fine-tuned (LoRS)").cells["average"]
    assert dense.mean == pytest.approx(81)


@pytest.mark.parametrize("apart", [{"pattern": "2:4"}, {"sparsity": 0.6}, {"support": "b" * 64}])
def test_models_that_came_with_other_zeros_are_other_tables(tmp_path, apart):
    tables = tables_of(tmp_path, came_sparse(0), came_sparse(1, **apart))
    assert [[row.n for row in table.rows if row.method == "lors"] for table in tables] == [[1], [1]]
    assert len({table.title for table in tables}) == 2


def test_one_config_on_two_pruned_checkpoints_is_never_one_mean(tmp_path):
    """As when a fix of a pruner comes between the seeds of a sweep; older files do not say which one they had."""
    old, new = ({"support": letter * 64} for letter in "ab")
    assert [row.n for table in tables_of(tmp_path / "same", result("lors"), result("lors", seed=1, **new))
            for row in table.trainings] == [2]  # fmt: skip
    runs = [result("lors", seed=seed, pruned=pruned, **which) for seed, which, pruned in
            ((0, old, (0.6, 1.2)), (1, new, (0.5, 1.3)), (2, new, (0.5, 1.3)))]  # fmt: skip
    tables = tables_of(tmp_path / "apart", *runs)
    assert sorted(row.n for table in tables for row in table.trainings) == [1, 2]
    scores = {table.trainings[0].n: row_of(table, "pruned").cells["average"].mean for table in tables}
    assert scores == {1: pytest.approx(60), 2: pytest.approx(50)}


def test_checkpoints_of_another_draw_of_the_pruner_stand_side_by_side_and_are_never_averaged(tmp_path):
    draws = [{"config": {"prune.seed": draw}, "pruned": (0.60 + 0.01 * draw, 1.2)} for draw in range(3)]
    runs = [lora(seed, 0.70 + 0.01 * draw, **options) for draw, options in enumerate(draws) for seed in range(3)]
    tables = tables_of(tmp_path, *runs)
    assert [table.title for table in tables] == [f"microworld, wanda 0.5, prune seed {draw}" for draw in range(3)]
    for draw, table in enumerate(tables):
        assert row_of(table, "pruned").cells["average"].mean == pytest.approx(60 + draw)
        assert row_of(table, "LoRA, with adapter").n == 3
    (side,) = side_by_side(tables)
    assert side.title == "microworld, wanda, averages"
    assert [column.title for column in side.quality][:5:2] == [f"0.5, prune seed {draw}" for draw in range(3)]


def test_an_option_that_older_runs_lack_and_a_class_that_moved_do_not_tell_rows_apart(tmp_path):
    new = {"method.peft.storage": "dense", "method.peft._target_": "elsewhere.Config", "method.version": 1}
    (table,) = tables_of(tmp_path / "alike", result("lors"), result("lors", seed=1, config=new))
    assert [row.n for row in table.trainings] == [2] and table.choices == {}
    other = new | {"method.peft.storage": "bitmap", "method.version": 2}
    (table,) = tables_of(tmp_path / "apart", result("lors"), result("lors", seed=1, config=other), result("spp"))
    rows = {row.label: [] for row in table.trainings}
    for row in table.trainings:
        rows[row.label].append(tuple(row.choices.values()))
    assert rows == {"LoRS": [("bitmap", "2"), ("dense", "1")], "SPP": [("-", "-")]}


def test_a_table_says_whether_it_was_pooled_and_only_variants_of_one_method_are(tmp_path, capsys):
    options = [{"method.peft.init": init, "method.peft.scaling": scaling}
               for init in ("gradient", "kaiming") for scaling in ("rank_stabilized", "alpha_over_r")]  # fmt: skip
    runs = [scored("lors", 0.70 + 0.01 * number + 0.001 * seed * (-1) ** number, seed=seed, config=option)
            for number, option in enumerate(options) for seed in range(3)]  # fmt: skip
    runs += [scored("lors", 0.75, seed=seed, config={"train.learning_rate": 0.1}) for seed in range(3)]
    runs += [lora(seed, 0.72 + 0.001 * seed) for seed in range(3)]
    (table,) = tables_of(tmp_path, *runs)
    said = (
        "Variance over the seeds: pooled over the 4 rows of LoRS (6 degrees of freedom), else n - 1 degrees of freedom."
    )
    assert table.pooling == said
    assert main(["tables", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert said in text and said in (tmp_path / "tables.tex").read_text()
    pairs = list(csv.DictReader((tmp_path / "differences.csv").open()))
    pooled = [pair for pair in pairs if pair["pooled"] != "0"]
    assert len(pooled) == 6 and {(pair["pooled"], pair["degrees"]) for pair in pooled} == {("4", "6")}
    assert all(pair["a"].startswith("LoRS (") and "0.001" in pair["a"] + pair["b"] for pair in pooled)
    assert {pair["degrees"] for pair in pairs if pair["pooled"] == "0"} == {"2", "inf"}


def test_every_p_value_says_what_it_is_conditional_on(runs, tmp_path):
    assert main(["tables", str(runs), "--output", str(tmp_path)]) == 0
    condition = "conditional on one pruned checkpoint and on learning rates from one search seed"
    assert condition in (tmp_path / "tables.md").read_text() and condition in (tmp_path / "tables.tex").read_text()
    pairs = list(csv.DictReader((tmp_path / "differences.csv").open()))
    assert {pair["condition"] for pair in pairs} == {condition}
    assert all(float(pair["holm"]) >= float(pair["p"]) for pair in pairs)
    assert "Variance over the seeds: not pooled, n - 1 degrees of freedom" in (tmp_path / "tables.md").read_text()


def test_the_reference_results_make_tables():
    groups = groups_of(load(["runs/reference/margins"]))
    assert any(len(group.runs) and len(group.tuned_dense) and len(group.controls) == 2 for group in groups)
