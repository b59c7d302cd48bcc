"""Simulated pruning against measured pruning on a CPU, and the run that makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from omegaconf import DictConfig

from analysis.__main__ import main
from harness.config import resolve
from harness.live_memory import LiveTensors
from harness.run import execute
from harness.simulate_pruning import WALKED, simulate_pruning
from lors.pruning import block_calls, prune_model

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "vocab_size": 100}
SAMPLES, LENGTH = 12, 24
RULES = [("wanda", "unstructured"), ("sparsegpt", "2:4")]
RULES += [pytest.param(*rule, marks=pytest.mark.slow) for rule in (("wanda", "2:4"), ("sparsegpt", "unstructured"))]


@pytest.fixture
def config(composed, monkeypatch):
    """Function from overrides to the config of pruning SAMPLES x LENGTH tokens, two samples at a time."""
    monkeypatch.setattr(block_calls, "BATCH_TOKENS", 2 * LENGTH + 1)
    calibration = [f"prune.samples={SAMPLES}", f"prune.sequence_length={LENGTH}"]
    return lambda *overrides: resolve(
        composed("mode=simulate", "method=none", "model=llama2_7b", *overrides, *calibration)
    )


def simulated(cfg: DictConfig) -> dict:
    return simulate_pruning(cfg, make_tiny_llama(**SHAPE).config)["memory"]


def measured(cfg: DictConfig) -> int:
    """Bytes of live tensors at the peak of the same walk with values, over all blocks and samples."""
    model, live = make_tiny_llama(**SHAPE), LiveTensors()
    tokens = torch.randint(0, 100, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    live.count([*model.parameters(), *model.buffers(), tokens], "weights")
    with live:
        prune_model(model, cfg.prune.name, sparsity=cfg.sparsity, pattern=cfg.pattern, calibration=tokens)
    return live.peak


@pytest.mark.parametrize(("pruner", "pattern"), RULES)
def test_as_measured_and_a_gpu_has_one_block_and_the_host_the_rest(config, pruner: str, pattern: str) -> None:
    """Of one device with everything, the GPU has what is neither hidden states nor weights of other blocks."""
    assert SHAPE["num_hidden_layers"] > WALKED and SAMPLES > 2 * WALKED
    rule = (f"prune={pruner}", f"pattern={pattern}")
    everything = measured(config(*rule))
    found = simulated(config(*rule, "simulate.device=cpu"))
    assert found["host_peak"] is None
    assert found["prune_peak"] == pytest.approx(everything, rel=0.01)

    model = make_tiny_llama(**SHAPE)
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    waiting = SAMPLES * LENGTH * (4 * SHAPE["hidden_size"] + 8)
    given = 2 * LENGTH * 4 * (SHAPE["hidden_size"] + 2 * 16)  # copies of a batch and its positions, in a forward pass
    expected = everything - (weights - block) - waiting
    found = simulated(config(*rule))
    assert 0.99 * expected <= found["prune_peak"] <= 1.01 * (expected + given)
    assert weights + waiting < found["host_peak"] < 1.05 * (weights + waiting)


def test_sparsegpt_holds_six_matrices_of_the_widest_input_at_once(config) -> None:
    """The sum, what is damped, its factor as it comes and turned round, the identity and the inverse factor."""
    width = 1000
    shape = make_tiny_llama(**SHAPE | {"intermediate_size": width}).config
    found = simulate_pruning(config("prune=sparsegpt"), shape)["memory"]["prune_peak"]
    assert 6 * 4 * width**2 < found < 6.3 * 4 * width**2


def test_a_run_says_what_device_and_host_need(composed, tmp_path: Path, capsys) -> None:
    shape = [f"model.shape.{name}={value}" for name, value in SHAPE.items()]
    words = ["mode=simulate", "method=none", "model=tinyllama_1b", *shape, f"runs_root={tmp_path}"]
    for precision in ("bf16", "float32"):
        result = execute(composed(*words, f"train.precision={precision}"))
        assert result["status"] == "ok", result["error"]
    printed = capsys.readouterr().out
    for part in ("at the peak of pruning on the cuda device", "bfloat16 weights and hidden", "1 x 16 GB, 1 x 24 GB"):
        assert part in printed
    assert "sample/s" not in printed
    assert main(["simulated", str(tmp_path)]) == 0
    text = (tmp_path / "simulated.md").read_text()
    assert "| tinyllama_1b | wanda | 0.5 | 64 x 128 | bfloat16 | 0.00 | 0.00 | 16 GB |" in text
    assert text.count("| wanda |") == 2
    assert "1.5 GiB stay free" in text and "FSDP" not in text
