"""``python -m analysis agreement``: rank correlations of the methods that two experiments share."""

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import result, write

from analysis.__main__ import main
from analysis.agreement import agreement
from analysis.results import load

ORDER = ("spp", "lors", "lora", "sqft", "hira")


@pytest.fixture
def two(tmp_path):
    """Function from the real model's held-out losses by method (LoRA: with adapter) to the folders of both models.

    The embedded one scores the methods in ORDER. Of LoRA all ends are recorded, of the real LoRS also exact gradients
    and what was pruned after the fine-tuning.
    """

    def make(losses, seeds=range(3)):
        embedded, real = tmp_path / "a" / "embedded", tmp_path / "a" / "real"
        for seed in range(3):
            for place, method in enumerate(ORDER):
                states = ("adapter", "dense") if method == "lora" else ("merged",)
                write(embedded, result(method, seed=seed, accuracy=0.6 + 0.05 * place + 0.001 * seed, states=states))
        write(embedded, result("full", accuracy=0.5), result("lors", sparsity=0.7))
        for method, loss in losses.items():
            for seed in seeds:
                states = ("adapter", "dense") if method == "lora" else ("merged",)
                of = {"model": "smollm2_135m", "seed": seed, "states": states, "accuracy": 0.3}
                write(real, result(method, answers=loss + 0.001 * seed, loss=9 - loss, **of))
        of = {"model": "smollm2_135m", "answers": 0.1}
        write(real, result("lors", **of, config={"method.peft.exact_gradient": True}))
        write(real, result("lors", **of, config={"prune.when": "after"}))
        return embedded, real

    return make


def test_a_row_for_each_score_of_the_methods_that_both_have(two):
    """Of losses less is better; of equal averages there is no order."""
    table = agreement(
        *map(load, ([place] for place in two({"hira": 1.0, "sqft": 1.2, "lora": 1.1, "lors": 1.3, "spp": 1.5})))
    )
    assert table.columns[:3] == ["pruned", "score of microworld", "score of smollm2_135m"]
    assert [row[:4] for row in table.rows] == [["wanda 0.5", "average", score, "5"]
                                              for score in ("held-out answers", "text", "average")]  # fmt: skip
    assert [row[4] for row in table.rows] == ["+0.90", "-0.90", "-"]
    assert table.rows[0][7] == "LoRA, with adapter; LoRS, exact gradient False; SQFT; SPP; HiRA"


@pytest.mark.parametrize("losses", [(1.0, 1.2, 1.1, 1.3, 1.5), (1.0, 1.1, 1.2, 1.3, 1.4), (1.4, 1.0, 1.1, 1.3, 1.2)])
def test_p_is_that_of_all_permutations(two, losses):
    methods = ("hira", "sqft", "lora", "lors", "spp")
    row = agreement(*map(load, ([place] for place in two(dict(zip(methods, losses, strict=True)))))).rows[0]
    rho = stats.spearmanr([5, 4, 3, 2, 1], -np.array(losses)).statistic
    of_all = [abs(stats.spearmanr(range(5), order).statistic) >= abs(rho) - 1e-9 for order in permutations(range(5))]
    assert row[4] == f"{rho:+.2f}" and float(row[6]) == pytest.approx(sum(of_all) / math.factorial(5), rel=0.05)


def test_the_interval_shows_the_noise_of_items_and_seeds(two):
    """Exact scores leave the order as it is; answers of another order in each row do not."""
    embedded, real = two({"hira": 1.0, "sqft": 1.2, "lora": 1.1, "lors": 1.3, "spp": 1.5})
    assert agreement(load([embedded]), load([real])).rows[0][5] == "+0.90 to +0.90"
    noisy = load([real])
    draw = np.random.default_rng(1).normal
    noisy["answers_items"] = [None if items is None else items + draw(0, 1, 4) for items in noisy.answers_items]
    low, high = agreement(load([embedded]), noisy).rows[0][5].split(" to ")
    assert float(low) < 0.5 < float(high)


def test_the_table_is_written_beside_the_first_and_bad_input_is_one_line(two, capsys):
    embedded, real = two({"hira": 1.0, "sqft": 1.2, "lora": 1.1}, seeds=[0])
    assert main(["agreement", str(embedded), str(real)]) == 0
    assert "| wanda 0.5 | average | held-out answers | 3 | +0.50 |" in (embedded.parent / "agreement.md").read_text()
    write(real, result("sqft", model="smollm2_135m", answers=1.0, config={"train.learning_rate": 0.1}))
    assert main(["agreement", str(embedded), str(real)]) == 2
    assert "runs: several of sqft, wanda 0.5, seed 0 for smollm2_135m" in capsys.readouterr().err
    write(embedded.parent / "other", result("lors"))
    assert main(["agreement", str(embedded), str(embedded.parent / "other")]) == 2
    assert "no pruned model with 3 methods" in capsys.readouterr().err
