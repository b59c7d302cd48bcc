"""Tables: which runs share a row and a table, what is bold, what is refused, and the three formats."""

import math
import re

import pandas as pd
import pytest
from synthetic_runs import MEBIBYTE, lora, result, row_of, scored, tables_of, write

from analysis.__main__ import main
from analysis.averages import side_by_side
from analysis.results import load
from analysis.table_cells import Cell
from analysis.tables import build


def trainings(table):
    """Label, n and texts of choices of each training."""
    text = table.panels["Size, memory and time"]
    n = text.columns.index("n")
    return [(row[0], int(row[n].replace("-", "0")), *row[1:n]) for row in text.rows]


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
    assert trainings(table) == [("LoRA", 3), ("LoRS", 3), ("SPP", 3)]
    assert list(table.panels) == ["Scores", "Size, memory and time"], "older results have no margins"


def test_cells_are_mean_and_standard_deviation_over_the_seeds(table):
    cell = row_of(table, "SPP").cells["average"]
    assert (cell.mean, cell.std) == (pytest.approx(70.2), pytest.approx(0.2))
    columns = {column.name: column for column in (*table.quality, *table.cost)}
    assert cell.text(columns["average"]) == "70.2 ± 0.2"
    assert row_of(table, "dense").cells["average"].text(columns["average"]) == "80.0"
    assert row_of(table, "LoRA, with adapter").cells["zeros_kept_percent"].text(columns["zeros_kept_percent"]) == "-"
    kept = columns["zeros_kept_percent"]
    assert row_of(table, "LoRA, zeros lost").cells[kept.name].mean == pytest.approx(0)
    assert Cell(mean=100 * (1 - 1e-9)).text(kept) == "99.99" and Cell(mean=100.0).text(kept) == "100"
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
    assert trainings(table) == [
        ("LoRA", 1, "32", "-"),
        ("LoRS", 2, "16", "gradient"),
        ("LoRS", 1, "16", "kaiming"),
        ("LoRS", 2, "32", "gradient"),
    ]
    # LoRA was run with rank 32 alone, so rank 16 has nothing to be compared with.
    of_lora = {row.text("adapter.r"): row.cells["step_ms_over_lora"].mean for row in table.rows if row.label == "LoRS"}
    assert of_lora["32"] == 1 and math.isnan(of_lora["16"])


def test_a_learning_rate_tuned_for_each_method_is_shown_and_does_not_part_it_from_lora(tmp_path):
    runs = [result("lora"), result("lors", config={"train.learning_rate": 3e-3})]
    (table,) = tables_of(tmp_path, *runs)
    row = row_of(table, "LoRS")
    assert row.text("train.learning_rate") == "0.003" and row.cells["step_ms_over_lora"].mean == 1


def test_another_protocol_is_another_table(tmp_path):
    runs = [result("lors", mode="profile", config={"train.sequence_length": length}) for length in (2048, 512, 1024)]
    runs += [
        result("lors"),
        result("lors", config={"eval.limit": 20}, dense=(0.5, 1.0)),
        result("lors", mode="simulate"),
    ]
    runs[-1]["memory"]["kind"] = "simulated"
    tables = tables_of(tmp_path, *runs)
    assert "simulated" in tables[-1].title and any("simulated on fake tensors" in note for note in tables[-1].notes)
    assert all(len(trainings(table)) == 1 for table in tables)
    assert [table.title for table in tables if table.axes["mode"] == "profile"] == [
        f"microworld, sparsity 0.5, random weights, time and memory only, sequence length {length}"
        for length in (512, 1024, 2048)
    ]
    limited = {table.axes.get("eval.limit"): table for table in tables if table.axes["mode"] == "run"}
    assert limited[20].rows[0].cells["average"].mean == pytest.approx(50)
    assert limited[None].rows[0].cells["average"].mean == pytest.approx(80)


@pytest.mark.parametrize("change", [{"device": "another GPU"}, {"torch": "2.11.0"}, {"transformers": "5.17.0"}])
def test_machines_are_mixed_on_demand_and_never_averaged(tmp_path, change, capsys):
    write(tmp_path, result("lors"), result("lors", seed=1, environment=change))
    assert main(["tables", str(tmp_path)]) == 2
    ((name, value),) = change.items()
    assert re.search(rf"{name}: .*{re.escape(value)}.*--mix", capsys.readouterr().err)
    assert main(["tables", "--mix", str(tmp_path)]) == 0
    (table,) = build(load([tmp_path]), mix=True)
    assert [n for _, n, _ in trainings(table)] == [1, 1] and list(table.choices) == [name]


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


def test_the_dense_model_fine_tuned_and_then_pruned_is_a_control(tmp_path):
    """Whatever zeros its seeds end with; without runs of that pruning it is a table."""
    last = [result("lors", seed=seed, accuracy=0.65, support=letter * 64, config={"prune.when": "after"})
            for seed, letter in enumerate("abc")]  # fmt: skip
    for content in last:
        content["baselines"]["pruned"] = None
    runs = [result("lors", seed=seed, support="f" * 64, config={"prune.when": "before"}) for seed in range(3)]
    runs += [result("lors", pruner="none", sparsity=0.0, accuracy=0.81)]
    runs += [result("lors", sparsity=0.7, config={"prune.when": "before"})]
    half, other = tables_of(tmp_path / "both", *runs, *last)
    assert half.title == "microworld, wanda 0.5" and not half.choices
    assert [(row.role, row.label, row.n) for row in half.rows] == [
        ("control", "dense", 0),
        ("control", "dense, fine-tuned (LoRS)", 1),
        ("control", "dense, fine-tuned, then pruned (LoRS)", 3),
        ("control", "pruned", 0),
        ("method", "LoRS", 3),
    ]
    (side,) = side_by_side([half, other])
    assert side.panels["Scores"].rows[2][:4] == ["dense, fine-tuned, then pruned (LoRS)", "3", "65.0 ± 0.0", "-"]
    (alone,) = tables_of(tmp_path / "alone", *last)
    assert trainings(alone) == [("LoRS", 3)]


def test_models_that_nobody_trained_are_tables_of_controls(tmp_path):
    runs = [result("lors"), result("none", pruner="magnitude", accuracy=0.5, pruned=(0.5, 2.0))]
    first, second = tables_of(tmp_path, *runs)
    assert second.title == "microworld, wanda 0.5" and first.title == "microworld, magnitude 0.5"
    assert [row.label for row in first.rows] == ["dense", "dense, fine-tuned", "pruned"]
    assert first.rows[2].cells["average"].mean == pytest.approx(50) and list(first.panels) == ["Scores"]


def test_a_control_that_scores_differently_shows_that_the_runs_do_not_belong_together(tmp_path):
    (table,) = tables_of(tmp_path, result("lors"), result("lors", seed=1, dense=(0.79, 0.9)))
    assert [row.label for row in table.rows].count("dense") == 2
    assert table.notes[0] == "The dense model was scored differently: code or data changed between these runs."


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
    (same,) = tables_of(tmp_path / "same", result("lors"), result("lors", seed=1, **new))
    assert trainings(same) == [("LoRS", 2)]
    runs = [result("lors", seed=seed, pruned=pruned, **which) for seed, which, pruned in
            ((0, old, (0.6, 1.2)), (1, new, (0.5, 1.3)), (2, new, (0.5, 1.3)))]  # fmt: skip
    tables = tables_of(tmp_path / "apart", *runs)
    scores = {trainings(table)[0][1]: row_of(table, "pruned").cells["average"].mean for table in tables}
    assert scores == {1: pytest.approx(60), 2: pytest.approx(50)}


def test_an_option_that_older_runs_lack_and_a_class_that_moved_do_not_tell_rows_apart(tmp_path):
    new = {"method.peft.storage": "dense", "method.peft._target_": "elsewhere.Config", "method.version": 1}
    (table,) = tables_of(tmp_path / "alike", result("lors"), result("lors", seed=1, config=new))
    assert trainings(table) == [("LoRS", 2)]
    other = new | {"method.peft.storage": "bitmap", "method.version": 2}
    (table,) = tables_of(tmp_path / "apart", result("lors"), result("lors", seed=1, config=other), result("spp"))
    assert trainings(table) == [("LoRS", 1, "bitmap", "2"), ("LoRS", 1, "dense", "1"), ("SPP", 1, "-", "-")]


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
    assert table.cautions == [said]
    assert main(["tables", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert said in text and said in (tmp_path / "tables.tex").read_text()
    pairs = pd.read_csv(tmp_path / "differences.csv")
    pooled = pairs[pairs.pooled != 0]
    assert len(pooled) == 6 and set(zip(pooled.pooled, pooled.degrees, strict=True)) == {(4, 6)}
    assert pooled.a.str.startswith("LoRS (").all() and (pooled.a + pooled.b).str.contains("0.001").all()
    assert set(pairs[pairs.pooled == 0].degrees) == {2, math.inf}


CONDITION = "conditional on one pruned checkpoint and on learning rates from one search seed"


def test_every_format_says_the_same_and_every_pair_of_rows_has_its_difference(table, runs, tmp_path):
    assert main(["tables", str(runs), "--output", str(tmp_path)]) == 0
    markdown, latex = ((tmp_path / f"tables.{ending}").read_text() for ending in ("md", "tex"))
    header = next(line for line in markdown.splitlines() if line.startswith("| method | n | boolq"))
    lors = next(line for line in markdown.splitlines() if line.startswith("| LoRS | 3 |"))
    assert header.count("|") == lors.count("|") and "**76.1 ± 0.1**" in lors
    assert r"\textbf{76.1 $\pm$ 0.1}" in latex and r"zeros kept (\%)" in latex and r"$\Delta$ LoRA" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\begin{tabular}") == 2
    columns = [line.count("&") for line in latex.splitlines() if line.endswith(r"\\")]
    assert set(columns) == {header.count("|") - 2, len(table.cost) + 1}
    for text in (markdown, latex):
        assert CONDITION in text and "Variance over the seeds: not pooled, n - 1 degrees of freedom" in text
    numbers = pd.read_csv(tmp_path / "tables.csv").set_index(["row", "column"])
    assert numbers.loc[("LoRS", "average"), ["mean", "std", "n", "best"]].tolist() == [76.1, 0.1, 3, True]
    assert len(numbers.loc[("LoRS", "average"), "runs"].split()) == 3 and not numbers.loc[("SPP", "average"), "best"]
    assert ("pruned", "step_ms") not in numbers.index
    pairs = pd.read_csv(tmp_path / "differences.csv")
    names = [row.label for row in table.rows if not math.isnan(row.cells["average"].mean)]
    assert len(pairs) == len(names) * (len(names) - 1) / 2 and set(pairs.table) == {table.title}
    assert set(pairs.condition) == {CONDITION} and (pairs.holm >= pairs.p).all()
    pair = pairs.set_index(["a", "b"]).loc[("LoRS", "SPP")]  # the higher one first
    assert pair.n == 3 and 0 < pair.p < 0.01 and pair.difference == pytest.approx(5.9)
    error = pairs.set_index(["a", "b"]).loc[("LoRS", "LoRA, with adapter"), "error"]
    assert error == pytest.approx(row_of(table, "LoRS").cells["average_minus_lora"].std, rel=1e-3)


def test_a_caption_says_what_the_weights_and_the_texts_are(tmp_path):
    """Dequantised weights are not the published ones; a result from before there was a provenance has no such note."""
    values = "four-bit (Q4_1, 210 matrices) values, dequantised to float32"
    weights = {"source": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "12fd", "values": values}
    data = {"source": "vicgalle/alpaca-gpt4", "rows": {"train.jsonl": 999}}
    known = result("lors") | {"provenance": {"model.path": weights, "data.path": data}}
    (table,) = tables_of(tmp_path / "known", known)
    assert f"SmolLM2-135M-Instruct: {values}." in table.notes
    assert "Local copies of vicgalle/alpaca-gpt4 (999 rows)." in table.notes
    published = {"model.path": {"source": "microworld"}, "data.path": {"source": "microworld"}}
    for number, older in enumerate((result("lors"), result("lors") | {"provenance": published})):
        (table,) = tables_of(tmp_path / str(number), older)
        assert not any("dequantised" in note or "copies" in note for note in table.notes)


def test_simulated_peaks_stand_beside_lora_with_the_cards_that_they_fit_on(tmp_path):
    of = {"simulate": {"device": "cuda", "shards": 1}, "train.activation_checkpointing": False}
    for method, peak in (("lora", 15 * 2**30), ("lors", 12 * 2**30)):
        run = result(method, mode="simulate", config=of, train_peak=peak, environment={"git_dirty": method == "lora"})
        if method == "lora":  # that of lors is older than this field
            run["memory"]["train_peak_by_devices"] = {"1": peak, "2": 14 * 2**30, "3": peak}
        write(tmp_path, run)
    assert main(["simulated", str(tmp_path)]) == 0
    text = (tmp_path / "simulated.md").read_text()
    assert "| LoRA | 512 | 16 | 15.00 | 1.00 |" in text and "| LoRS | 512 | 16 | 12.00 | 0.80 |" in text
    header, _, lora, lors = [line for line in text.splitlines() if line.startswith("|")]
    assert header.endswith("| 16 GB | 24 GB | 48 GB | 80 GB |") and "1 of 2 runs with changes" in text
    assert lora.endswith("| 2 | 1 | 1 | 1 |") and lors.endswith("| 1 | 1 | 1 | 1 |")
