"""``python -m analysis lr``: the same search for every method, and the winners in the recipe of the tables."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from synthetic_runs import result, write

from analysis.__main__ import main
from analysis.rates import RECIPE
from harness.config import resolve

RATES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)


@pytest.fixture
def search(tmp_path) -> Callable[..., Path]:
    """Function from method -> accuracy at each rate (None: diverged) to the folder of such a search."""

    def make(**methods: tuple[float | None, ...]) -> Path:
        for method, accuracies in methods.items():
            for rate, accuracy in zip(RATES, accuracies, strict=False):
                status = "ok" if accuracy else "failed"
                write(
                    tmp_path / "runs",
                    result(method, accuracy=accuracy or 0.0, status=status, config={"train.learning_rate": rate}),
                )
        return tmp_path / "runs"

    return make


@pytest.fixture
def recipe(tmp_path) -> Path:
    return Path(shutil.copy(RECIPE, tmp_path / "tuned.yaml"))


def test_the_winners_reach_the_recipe_and_the_rest_of_it_stays(search, recipe, capsys) -> None:
    runs = search(lors=(0.7, 0.8, None), spp=(0.6, 0.7, 0.75))
    before = yaml.safe_load(RECIPE.read_text())
    for _ in range(2):  # a second time over the rates of the first
        assert main(["lr", str(runs), "--recipe", str(recipe), "--write"]) == 0
        after = yaml.safe_load(recipe.read_text())
        assert after == before | {"tuned": before["tuned"] | {"lors": 0.001, "spp": 0.01}}
    lines = [[line for line in file.read_text().splitlines() if not line.startswith("  ")] for file in (recipe, RECIPE)]
    assert lines[0] == lines[1] and list(after["tuned"]) == sorted(after["tuned"])
    assert [file.name for file in recipe.parent.iterdir() if file.is_file()] == [recipe.name]
    printed = capsys.readouterr().out
    assert "| lors | 70.0 | **80.0** | diverged |" in printed and f"{recipe}: written" in printed
    assert "At an end of the grid, so that a rate beyond it may be better: spp." in printed
    assert (runs / "lr.md").read_text() in printed
    elsewhere = runs.parent / "not" / "there yet"
    assert main(["lr", str(runs), "--recipe", str(recipe), "--output", str(elsewhere)]) == 0
    assert (elsewhere / "lr.md").read_text() == (runs / "lr.md").read_text()


def test_a_rate_at_which_one_of_the_seeds_diverged_does_not_win(search, capsys) -> None:
    runs = search(lors=(0.7, 0.8, 0.9))
    for rate, status in zip(RATES, ("ok", "ok", "failed"), strict=False):
        write(runs, result("lors", seed=1, accuracy=0.7, status=status, config={"train.learning_rate": rate}))
    assert main(["lr", str(runs)]) == 0
    assert "| lors | 70.0 | **75.0** | diverged |" in capsys.readouterr().out


@pytest.fixture
def unscored(tmp_path) -> Callable[..., Path]:
    """Function from method -> {rate: loss of held-out answers} to the folder of such a search, without tasks."""

    def make(**methods: dict[float, float]) -> Path:
        for method, losses in methods.items():
            for rate, loss in losses.items():
                content = result(method, answers=loss, config={"train.learning_rate": rate})
                content["eval"] |= {"tasks": {}, "average": None, "perplexity": None}
                write(tmp_path / "runs", content)
        return tmp_path / "runs"

    return make


def test_without_tasks_the_least_loss_of_held_out_answers_wins_on_grids_of_each_method(
    unscored, recipe, capsys
) -> None:
    of_lors = {1e-3: 2.0, 3e-3: 1.5, 1e-2: 1.75}
    of_spp = {1e-2: 2.0, 3e-2: 1.9, 1e-1: 1.8, 3e-1: 1.7}
    of_hira = {3e-3: 1.5, 1e-2: 1.6, 3e-2: 1.8}
    runs = unscored(lors=of_lors, hira=of_hira, spp=of_spp)
    assert main(["lr", str(runs), "--recipe", str(recipe), "--write"]) == 0
    printed = capsys.readouterr().out
    assert "| method | 0.001 | 0.003 | 0.01 | 0.03 | 0.1 | 0.3 |" in printed
    assert "| lors | 7.39 | **4.48** | 5.75 | - | - | - |" in printed
    assert "| spp | - | - | 7.39 | 6.69 | 6.05 | **5.47** |" in printed
    assert "Perplexity of held-out answers; the least wins." in printed
    assert "Continued beyond 3 rates, since the best lay at an end: spp (4 rates)." in printed
    assert "so that a rate beyond it may be better: hira, spp." in printed
    assert yaml.safe_load(recipe.read_text())["tuned"]["spp"] == 0.3


def test_a_search_goes_on_beyond_the_end_at_which_the_best_lay_and_nowhere_else(unscored, capsys) -> None:
    short = {1e-3: 2.0, 3e-3: 1.5, 1e-2: 1.75}
    down = {3e-4: 1.6, 1e-3: 1.5, 3e-3: 1.7, 1e-2: 1.8}
    assert main(["lr", str(unscored(lors=short, lora=down))]) == 0
    more = {1e-4: 1.9, 3e-4: 1.6, 1e-3: 1.5, 3e-3: 1.7, 1e-2: 1.8}  # the best was inside
    assert main(["lr", str(unscored(hira=more))]) == 2
    assert "lora (3" not in (error := capsys.readouterr().err) and "and hira (5); a longer" in error


def test_every_rate_has_the_same_seeds(search, capsys) -> None:
    runs = search(lors=(0.7, 0.8, 0.6))
    write(runs, result("lors", seed=1, accuracy=0.7, config={"train.learning_rate": RATES[0]}))
    assert main(["lr", str(runs)]) == 2
    assert "every rate must have the same seeds, here 0 or 0, 1" in capsys.readouterr().err


def test_a_recipe_is_written_only_if_asked_and_whole_or_not_at_all(search, recipe, capsys, monkeypatch) -> None:
    runs, before = search(lors=(0.7, 0.8, 0.6)), recipe.read_text()
    assert main(["lr", str(runs), "--recipe", str(recipe)]) == 0
    assert recipe.read_text() == before and "not changed; --write sets these rates" in capsys.readouterr().out

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["lr", str(runs), "--recipe", str(recipe), "--write"]) == 2
    assert recipe.read_text() == before and "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    recipe.write_text("steps: 200\n")
    assert main(["lr", str(runs), "--recipe", str(recipe), "--write"]) == 2
    assert "must have one key tuned" in capsys.readouterr().err and recipe.read_text() == "steps: 200\n"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"lors": (0.8, 0.7, 0.75), "spp": (0.6, 0.7)}, "not the same search for spp (2 rates) and lors (3); a longer"),
        ({"lors": (0.7, 0.8, 0.7, 0.6, 0.5)}, "rates must be a constant factor apart, here 3 to 10"),
        ({"lors": (None, None, None)}, "lors ended well at no rate"),
        ({"none": (0.6,)}, "no fine-tuned run below"),
        ({"lors": (0.7,), "spp": (0.6,)}, "only the rate 0.0001 below; a search has two or more"),
    ],
)
def test_an_unfair_or_empty_search_is_refused(search, recipe, capsys, methods, message) -> None:
    before = recipe.read_text()
    assert main(["lr", str(search(**methods)), "--recipe", str(recipe), "--write"]) == 2
    assert message in capsys.readouterr().err
    assert recipe.read_text() == before


def test_a_run_has_the_rate_of_its_method_and_any_other_a_fixed_one(composed) -> None:
    assert resolve(composed("train.tuned.spp=0.5", "method=spp")).train.learning_rate == 0.5
    assert resolve(composed("~train.tuned", "method=lora")).train.learning_rate == 1e-3
