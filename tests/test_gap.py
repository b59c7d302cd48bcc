"""``harness.gradient_angles`` and ``analysis gap``: where the mask in the gradients of LoRS pays."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from conftest import make_tiny_llama
from peft import get_peft_model
from synthetic_runs import result, write
from test_harness_run import SHORT, tiny  # noqa: F401

import lors
from analysis.__main__ import main
from analysis.gap import gaps
from analysis.results import load
from harness.gradient_angles import angles
from harness.gradient_angles import main as measure
from harness.run import execute
from lors.pruning import prune_model

TOKENS = torch.arange(5, 45).view(2, 20)
BATCHES = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in TOKENS.split(1)]


def adapted(gradient: str, sparsity: float) -> torch.nn.Module:
    """A pruned model with an adapter that does something, in float64."""
    model = make_tiny_llama().double()
    prune_model(model, "magnitude", sparsity=sparsity)
    config = lors.LorsConfig(r=3, init="kaiming", gradient=gradient, target_modules="all-linear")
    torch.manual_seed(1)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lors_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    """Of the mean loss of all rows, which have equally many targets."""
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_angle_lengths_and_share_are_those_of_two_models_that_train_with_either_gradient():
    straight, exact = (gradient_of(adapted(how, 0.5)) for how in ("straight_through", "exact"))
    model = adapted("sampled", 0.5)
    found = angles(model, BATCHES)
    assert found["cosine"] == pytest.approx((straight @ exact / straight.norm() / exact.norm()).item())
    assert found["ratio"] == pytest.approx((straight.norm() / exact.norm()).item())
    assert found["cosine"] < 0.99  # else nothing was told apart
    changes = [
        (layer.lors_B["default"] @ layer.lors_A["default"], layer.base_layer.weight == 0)
        for layer in model.modules()
        if hasattr(layer, "lors_B")
    ]
    off, all_of_it = (sum(part.square().sum() for part in parts) for parts in zip(*((c[M], c) for c, M in changes)))  # noqa: B905
    assert found["off_support"] == pytest.approx((off / all_of_it).item())
    assert model.peft_config["default"].gradient == "sampled"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_zeros_the_gradients_are_one_and_without_an_update_there_is_no_share():
    found = angles(adapted("exact", 0.0), BATCHES)
    assert (found["cosine"], found["ratio"], found["off_support"]) == pytest.approx((1, 1, 0))
    model = adapted("exact", 0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0 if "lors_B" in name else 1)
    assert angles(model, BATCHES)["off_support"] is None


def test_runs_are_measured_at_their_start_and_at_their_end(tiny, tmp_path, capsys):  # noqa: F811
    run = execute(tiny("method=lors", "method.peft.init=kaiming", *SHORT))
    execute(tiny("method=lora", *SHORT))
    assert measure([str(tmp_path / "runs"), "--batches", "1", "--output", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "angles.csv", dtype={"key": str})
    assert list(table.key) == [run["key"]] * 2 and list(table.place) == ["start", "end"]
    assert table.cosine.between(0.1, 0.999).all() and table.cosine.nunique() == 2
    assert math.isnan(table.off_support[0]) and 0.2 < table.off_support[1] < 0.8
    capsys.readouterr()
    assert measure([str(tmp_path / "nothing"), "--output", str(tmp_path)]) == 2
    assert "no finished run of method=lors below" in capsys.readouterr().err


@pytest.fixture
def runs(tmp_path):
    """Two sparsities, three seeds: exact is 2 points better at 0.7, and equal at 0.5 with one seed in common."""
    folder = tmp_path / "runs"

    def put(sparsity, gradient, seed, accuracy, **config):
        chosen = {"method.peft.gradient": gradient} | config
        content = result("lors", sparsity=sparsity, seed=seed, accuracy=accuracy, loss=1 - accuracy, config=chosen)
        write(folder, content)
        return content["key"]

    keys = [put(0.7, "straight_through", seed, 0.6 + 0.001 * seed) for seed in range(3)]
    for seed in range(3):
        put(0.7, "exact", seed, 0.62 + 0.002 * seed)
        put(0.7, "exact", seed, 0.9, **{"method.peft.gradient_until": 0.5})
        put(0.7, "sampled", seed, 0.9)
    put(0.5, "straight_through", 0, 0.7)
    # As older results say it.
    put(0.5, "straight_through", 0, 0.7, **{"method.peft.exact_gradient": True})
    rows = [(key, *of_place) for key in keys for of_place in (("start", 0.5, None), ("end", 0.75, 0.25))]
    pd.DataFrame(rows, columns=["key", "place", "cosine", "off_support"]).to_csv(folder / "angles.csv", index=False)
    return folder


def test_a_row_for_each_setting_with_what_exact_gains(runs):
    half, more = gaps(load([runs]), pd.read_csv(runs / "angles.csv", dtype={"key": str}))
    gain = more.gains["accuracy (points)"]
    assert more.setting == {"model": "microworld", "pruned": "wanda 0.7"}
    assert (gain.mean, gain.n) == (pytest.approx(2.1), 3)
    assert more.gains["text (nats)"].mean == pytest.approx(-0.021)  # exact minus straight-through: less loss
    assert more.gains["answers (nats)"] is None
    assert more.angles == {"cosine, start": 0.5, "cosine, end": 0.75, "off the support (%)": 0.25}
    one = half.gains["accuracy (points)"]
    assert (one.mean, one.n) == (0, 1) and math.isnan(one.p) and math.isnan(half.angles["cosine, start"])


def test_the_table_and_the_plot_are_written(runs, tmp_path, capsys):
    assert main(["gap", str(runs), "--angles", str(runs / "angles.csv"), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "gap.md").read_text()
    assert "| microworld | wanda 0.7 | 3 | +2.10 ±" in text and "| +0.0210 ±" in text and "| 0.5 | 0.75 | 25 |" in text
    assert "| microworld | wanda 0.5 | 1 | +0.00 ±" in text
    assert [file.name for file in tmp_path.glob("*.png")] == ["gap_by_cosine.png"]


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys):
    write(tmp_path / "other", result("lors"), result("sqft"))
    assert main(["gap", str(tmp_path / "other")]) == 2
    assert "no two of LoRS that differ in method.peft.gradient=exact" in capsys.readouterr().err
    (tmp_path / "angles.csv").write_text("key,place,cosine,off_support\n0123,start,0.5,\n0123,end,0.5,0.2\n")
    assert main(["gap", str(runs), "--angles", str(tmp_path / "angles.csv"), "--output", str(tmp_path)]) == 2
    assert "--angles: has 'cosine, start' of no run with an accuracy" in capsys.readouterr().err
    other = {"config": {"method.peft.gradient": "exact"}, "environment": {"device": "another"}}
    write(tmp_path / "other", result("lors", sparsity=0.7, accuracy=0.6, **other))
    assert main(["gap", str(runs), str(tmp_path / "other")]) == 2
    assert "several of microworld, wanda 0.7, exact, seed 0" in capsys.readouterr().err
