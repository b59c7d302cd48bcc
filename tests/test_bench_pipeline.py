"""The benchmark of the pipeline: what it compares, and that both sides do the same."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from architectures import Architecture

from harness.bench import pipeline
from harness.bench.wanda_by_sample import prune_by_sample
from lors.blocks import decoder_linears
from lors.pruning import prune_model

TINY = ["prune.samples=4", "prune.sequence_length=32", "train.steps=3", "train.timing_warmup=1", "train.batch_size=2"]
TINY += ["train.init_rows=4", "train.sequence_length=32", "data.limit=50"]


@pytest.mark.parametrize("name", ["Llama", "OPT", "GPTNeoX"])
def test_the_published_walk_keeps_the_same_weights(name) -> None:
    fields = {"ffn_dim": 48, "word_embed_proj_dim": 32} if name == "OPT" else {}
    ours, theirs = (Architecture(name, fields).build() for _ in range(2))
    calibration = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(0))
    prune_model(ours, "wanda", sparsity=0.5, pattern="unstructured", calibration=calibration)
    prune_by_sample(theirs, calibration, sparsity=0.5)
    for key, linear in decoder_linears(theirs).items():
        assert ((linear.weight == 0).sum(1) == linear.in_features // 2).all()
        assert torch.equal(linear.weight, ours.get_submodule(key).weight), key
    assert not any(module._forward_pre_hooks for module in theirs.modules())


@pytest.mark.slow
def test_the_command_compares_all_parts_on_one_model(tmp_path, capsys, no_network) -> None:
    arguments = ["microworld", "--rounds", "1", "--limit", "2", "--profile", "--output", str(tmp_path / "out")]
    assert pipeline.main([*arguments, *TINY, f"cache_root={tmp_path}"]) == 0
    table = pd.read_csv(tmp_path / "out" / "pipeline.csv").set_index("part")
    assert list(table.index) == ["prune", "score", "train", "init"]
    assert list(table.unit) == ["sample", "item", "token", "row"]
    assert table.amount[["prune", "score", "init"]].tolist() == [4, 14, 4]
    assert (table.ratio == table.ours / table.theirs).all() and (table.ours > 0).all()
    assert table.difference["prune"] < 1e-4
    assert 0 < table.difference["score"] <= 2e-5
    assert table.difference["train"] < 1e-6
    assert {"ratio_min", "ratio_max", "rounds", "precision", "samples", "threads", "git_commit"} <= set(table)
    assert list(table.precision) == ["float32", "float32", "bf16_mixed", "float32"]
    assert "ratio" in capsys.readouterr().out
    profile = pd.read_csv(tmp_path / "out" / "profile.csv")
    assert set(profile.part) == set(table.index) and profile.groupby("part").share.sum().between(0.5, 1).all()
    assert "aten::mm" in set(profile[profile.part == "train"].operator)


def test_the_sides_take_turns(monkeypatch) -> None:
    """The median is over the rounds, and so is that of the ratios."""
    order: list[str] = []
    seconds = {"ours": iter([1.0, 4.0, 9.0]), "theirs": iter([2.0, 2.0, 3.0])}

    def side(name: str):
        return lambda _: (order.append(name), pipeline.Measured(next(seconds[name]), 7, {"x": len(order)}))[1]

    monkeypatch.setitem(pipeline.PARTS, "prune", ((side("ours"), side("theirs")), "sample", ("method=none",)))
    monkeypatch.setattr(pipeline, "_setting", lambda *_: pipeline.Setting(composed_quickly(), None, None))
    options = pipeline.argparse.Namespace(rounds=3, overrides=[])
    row = pipeline.measure("prune", options)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (row["ours"], row["theirs"], row["ratio"]) == (4.0, 2.0, 2.0)
    assert (row["ratio_min"], row["ratio_max"], row["amount"], row["difference"]) == (0.5, 3.0, 7, 1)


def composed_quickly():
    with pipeline.initialize_config_dir(str(pipeline.CONF), version_base="1.3"):
        return pipeline.compose("config", ["method=none"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["microworld", "--rounds", "0"], "--rounds 0: must be a whole number >= 1"),
        (["microworld", "train.steps=4"], "train.timing_warmup=4: must be at least 1 and less than train.steps=4"),
        (["nowhere/at/all"], "model.path=nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message) -> None:
    assert pipeline.main([*arguments, "--output", str(tmp_path), f"cache_root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_the_time_of_a_kernel_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU the profiler gives operators and kernels; the time of an operator is that of its kernels."""
    of = torch.autograd.DeviceType
    found = [("aten::mm", of.CPU, 3.0), ("aten::add", of.CPU, 1.0), ("gemm", of.CUDA, 3.0), ("add", of.CUDA, 1.0)]
    events = [SimpleNamespace(key=key, device_type=on, self_device_time_total=t, count=2) for key, on, t in found]
    profiler = nullcontext(SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda: profiler)
    monkeypatch.setattr(pipeline, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(pipeline, "_setting", lambda *_: None)
    monkeypatch.setitem(pipeline.PARTS, "prune", ((lambda setting: None,), "sample", ()))
    shares = {row["operator"]: row["share"] for row in pipeline.profile("prune", None)}
    assert shares == {"aten::mm": 0.75, "aten::add": 0.25}
