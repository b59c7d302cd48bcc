"""Scores of several tables side by side, and what a model without tasks is scored by: held-out answers and margins."""

import pandas as pd
import pytest
from synthetic_runs import lora, result, row_of, scored, tables_of, write

from analysis.__main__ import main
from analysis.averages import side_by_side
from analysis.results import load
from analysis.table_writer import Bold
from analysis.tables import build


def test_averages_of_several_tables_stand_side_by_side(tmp_path, capsys):
    levels = ({"sparsity": 0.5}, {"sparsity": 0.7, "dense": (0.81, 0.9)}, {"sparsity": 0.5, "pattern": "2:4"})
    runs = [lora(seed, 0.70 + 0.001 * seed, **level) for level in levels for seed in range(3)]
    runs += [scored("lors", 0.75 + 0.001 * seed, seed=seed, **levels[0]) for seed in range(3)]
    runs += [scored("lors", 0.69, seed=0, **levels[2])]
    write(tmp_path, *runs)
    tables = build(load([tmp_path]))
    (side,) = side_by_side(tables)
    assert side.title == "microworld, wanda, averages"
    assert [table.axes["label"] for table in tables] == ["0.5", "0.7", "2:4"], "the order of the columns is theirs"
    text = side.panels["Scores"]
    heads = ["0.5", "Δ LoRA", "0.7", "Δ LoRA", "2:4", "Δ LoRA"]
    assert text.columns == ["method", "n", *heads, "trainable", "memory (MiB)", "GFLOP/step"]
    assert text.methods[: text.controls] == ["dense", "dense", "dense", "pruned"]
    lors = text.rows[text.methods.index("lors")]
    assert lors == ["LoRS", "1 to 3", "75.1 ± 0.1", "+5.0 ± 0.1", "-", "-", "69.0", "-1.1", "1,000", "100.0", "1.0"]
    assert isinstance(lors[2], Bold) and not isinstance(lors[6], Bold)
    assert len(text.runs[text.methods.index("lors")]) == 4
    # One dense model was scored differently: both rows are there.
    assert sorted(row[2] for row in text.rows if row[0] == "dense") == ["80.0", "81.0"]
    assert main(["tables", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("## microworld, wanda, averages") < printed.index("## microworld, wanda 0.5")


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """LoRA and LoRS at two sparsities, alike in accuracy; LoRS is ahead in held-out answers, behind in the text."""
    folder = tmp_path_factory.mktemp("answered")
    for sparsity in (0.5, 0.6):
        for seed in range(3):
            shared = {"seed": seed, "sparsity": sparsity, "accuracy": 0.3, "model": "smollm2_135m"}
            states = ("adapter", "remasked", "dense")
            write(folder, result("lora", loss=2.0, answers=2.0 + 0.001 * seed, margin=-0.2, states=states, **shared))
            more = {"answers": 1.9 + 0.001 * seed, "margin": 0.3 + 0.01 * seed}
            write(folder, result("lors", loss=2.1, **more, **shared))
            write(folder, result("spp", loss=2.2, answers=2.2 - 0.003 * seed, margin=-0.5 - 0.01 * seed, **shared))
    return folder


def test_average_text_and_answers_stand_side_by_side_each_in_a_table(answered, tmp_path, capsys):
    sides = side_by_side(build(load([answered])))
    names = ["averages", "WikiText-2 perplexity", "held-out answers"]
    assert [side.title for side in sides] == [f"smollm2_135m, wanda, {name}" for name in names]
    of_answers = sides[2].panels["Scores"]
    assert of_answers.columns[2:6] == ["0.5", "Δ LoRA (nats)", "0.6", "Δ LoRA (nats)"]
    assert of_answers.rows[of_answers.methods.index("lors")][2:4] == ["6.69 ± 0.01", "-0.100 ± 0.000"]
    assert any("below 0 is better than LoRA" in note for note in sides[2].notes)
    assert main(["tables", str(answered), "--output", str(tmp_path)]) == 0
    pairs = pd.read_csv(tmp_path / "differences.csv").set_index(["table", "score", "a", "b"]).sort_index()
    better = pairs.loc[("smollm2_135m, wanda 0.6", "answers_perplexity", "LoRS", "SPP")]
    assert better.difference.item() == pytest.approx(0.296) and better.p.item() < 0.01
    numbers = pd.read_csv(tmp_path / "tables.csv")
    assert {"rte_margin", "answers_perplexity_log_minus_lora"} <= set(numbers.column)


def test_rows_of_one_choice_stand_in_one_line_also_where_a_table_has_no_other(tmp_path):
    exact = {"method.peft.exact_gradient": True}
    runs = [result("lors", pruner="sparsegpt"), result("sqft", pruner="sparsegpt"), result("lors"), result("lora")]
    runs += [result("lors", config=exact, accuracy=0.75)]
    (side,) = side_by_side(tables_of(tmp_path, *runs))
    text = side.panels["Scores"]
    assert text.columns[1] == "exact gradient"
    assert [row[:6] for row in text.rows[text.controls :]] == [
        ["LoRA", "-", "1", "-", "-", "70.0"],
        ["LoRS", "no", "1", "70.0", "-", "70.0"],
        ["LoRS", "yes", "1", "-", "-", "75.0"],
        ["SQFT", "-", "1", "70.0", "-", "-"],
    ]


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
    assert side.panels["Scores"].columns[2:8:2] == [f"0.5, prune seed {draw}" for draw in range(3)]


def test_held_out_answers_stand_beside_the_text_and_both_are_compared_by_their_losses(answered):
    table, _ = build(load([answered]))
    titles = [column.title for column in table.quality]
    assert titles[-6:-1] == ["Δ LoRA", "WikiText-2 perplexity", "Δ LoRA (nats)", "held-out answers (perplexity)",
                             "Δ LoRA (nats)"]  # fmt: skip
    lors = {column.name: row_of(table, "LoRS").cells[column.name].text(column) for column in table.quality}
    assert lors["answers_perplexity"] == "6.69 ± 0.01" and isinstance(lors["answers_perplexity"], Bold)
    assert lors["answers_perplexity_log_minus_lora"] == "-0.100 ± 0.000"
    assert lors["perplexity_log_minus_lora"] == "+0.100 ± 0.014" and not isinstance(lors["perplexity"], Bold)
    assert any(note.startswith("Held-out answers: those of 4 rows") for note in table.notes)


def test_a_panel_has_the_margins_of_the_right_answers(answered):
    of_smol, _ = build(load([answered]))
    panel = of_smol.panels["Margins of the right answer (nats)"]
    lors = next(row for row in panel.rows if row[0] == "LoRS")
    assert panel.columns[:3] == ["method", "n", "boolq margin (nats)"] and len(panel.columns) == 9
    assert lors[2] == "0.31 ± 0.01" and isinstance(lors[2], Bold)
    assert any(note.startswith("Margin: ") and "up to 0.50" in note for note in of_smol.notes)
