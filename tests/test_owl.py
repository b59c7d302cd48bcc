"""OWL: shares of outliers and sparsities against their definitions; in the library, the bench and the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import make_tiny_llama, sentence, write_rows
from hypothesis import given
from hypothesis import strategies as st
from pruning_problems import REPEATABLE
from test_harness_run import SHORT, folder_of, tiny  # noqa: F401 - a fixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lors
from harness.config import resolve
from harness.errors import BadInput
from harness.identity import run_key
from harness.models import pruner_options
from harness.run import execute
from lors import command_line
from lors.blocks import decoder_linears
from lors.pruning.owl import owl_sparsities
from lors.sparsity import sparsity_of

TOKENS = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(1))
M = 2.5


def uneven() -> LlamaForCausalLM:
    """Three blocks, the second one larger, the first and third with outliers of their own."""
    model = make_tiny_llama(num_hidden_layers=3)
    torch.manual_seed(1)
    wide = model.model.layers[1].mlp
    wide.gate_proj, wide.up_proj = (nn.Linear(32, 96, bias=False) for _ in range(2))
    wide.down_proj = nn.Linear(96, 32, bias=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:5] *= 20
        model.model.layers[2].mlp.up_proj.weight[:, :3] *= 20
    return model


def by_block(model: nn.Module) -> dict[int, dict[str, nn.Linear]]:
    blocks: dict[int, dict[str, nn.Linear]] = {}
    for name, linear in decoder_linears(model).items():
        blocks.setdefault(int(name.split(".")[2]), {})[name] = linear
    return blocks


@torch.no_grad()
def defined(model: nn.Module, threshold: float) -> tuple[list[float], list[int]]:
    """D_l and sizes: all in float64, of one run of the whole model."""
    model = model.double()
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [linear.register_forward_pre_hook(lambda linear, args: inputs.update({linear: args[0].flatten(0, -2)}))
             for linear in decoder_linears(model).values()]  # fmt: skip
    model(input_ids=TOKENS)
    for hook in hooks:
        hook.remove()
    A = [torch.cat([(W.weight.abs() * inputs[W].norm(dim=0)).flatten() for W in linears.values()])
         for linears in by_block(model).values()]  # fmt: skip
    return [(a > threshold * a.mean()).double().mean().item() for a in A], [len(a) for a in A]


# ---- the definition


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "magnitude"])
def test_every_block_has_the_sparsity_of_its_outliers(pruner: str) -> None:
    model, S, spread = uneven(), 0.6, 0.1
    D, sizes = defined(uneven(), M)
    mean = sum(d * n for d, n in zip(D, sizes, strict=True)) / sum(sizes)
    wanted = [S - spread * (d - mean) / max(abs(d - mean) for d in D) for d in D]
    assert len(set(sizes)) == 2 and len(set(D)) == 3
    limits = {"outlier_threshold": M, "sparsity_range": spread}
    lors.prune(model, pruner, sparsity=S, layerwise="owl", calibration=TOKENS, **limits)
    for block, linears in by_block(model).items():
        for linear in linears.values():
            W = linear.weight
            rows = (W == 0).sum(1) if pruner == "wanda" else (W == 0).sum()[None]
            competing = W.numel() // len(rows)
            assert (rows == int(competing * wanted[block])).all()
    assert sparsity_of(model) == pytest.approx(S, abs=1 / 32 if pruner == "wanda" else 1e-3)


def test_the_walk_over_the_dense_model_has_a_bar_and_one_block_at_a_time(monkeypatch, capsys) -> None:
    model, moves = uneven(), []
    for i, block in enumerate(model.model.layers):
        monkeypatch.setattr(block, "to", lambda device, i=i: moves.append((i, str(device))))
    prune = partial(lors.prune, sparsity=0.6, layerwise="owl", outlier_threshold=M, calibration=TOKENS)
    prune(model, device="cuda")
    assert moves == 2 * [(i, device) for i in range(3) for device in ("cuda", "cpu")]
    shown = capsys.readouterr().err
    assert "outliers (owl):   0%|          | 0/18 " in shown and "18/18" in shown and "30/30" in shown
    here = uneven()
    prune(here)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), here.parameters(), strict=True))


blocks = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=12)


@REPEATABLE
@given(blocks, st.floats(0.2, 0.8), st.floats(0.01, 0.2))
def test_sparsities_have_the_mean_the_range_and_the_order_that_are_asked_for(parts, S, spread) -> None:
    D, sizes = zip(*parts, strict=True)
    found = owl_sparsities(D, sizes, sparsity=S, sparsity_range=spread)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(S, abs=1e-9)
    away = [abs(s - S) for s in found]
    assert max(away) == (0 if len(set(D)) == 1 else pytest.approx(spread, abs=1e-12))
    ordered = [s for _, s in sorted(zip(D, found, strict=True), key=lambda pair: (pair[0], -pair[1]))]
    assert ordered == sorted(found, reverse=True)


def test_more_outliers_are_less_sparsity_and_equal_ones_the_same() -> None:
    find = partial(owl_sparsities, sparsity=0.7, sparsity_range=0.08)
    assert find([0.01, 0.02, 0.03], [5, 5, 5]) == pytest.approx([0.78, 0.7, 0.62])
    assert find([0.01, 0.03], [3, 1]) == pytest.approx([0.7 + 0.08 / 3, 0.62])  # the small one is farther away
    assert find([0.1, 0.1, 0.1], [7, 1, 3]) == [0.7] * 3
    uniform, same = make_tiny_llama(), make_tiny_llama()
    lors.prune(uniform, sparsity=0.7, calibration=TOKENS)
    lors.prune(same, sparsity=0.7, calibration=TOKENS, layerwise="owl", outlier_threshold=1e9)
    assert all(torch.equal(a, b) for a, b in zip(uniform.parameters(), same.parameters(), strict=True))


def test_experts_without_a_token_have_no_outliers_and_the_sparsity_of_their_block() -> None:
    model = ARCHITECTURES["gpt_oss"].build()
    model.model.layers[1].mlp.router.bias.data[3] = -1e4
    lors.prune(model, sparsity=0.6, layerwise="owl", outlier_threshold=M, calibration=TOKENS)
    found = lors.check(model)["layers"]
    widths = {name: linear.in_features for name, linear in decoder_linears(model).items()}
    for block in ("0", "1"):
        zeros = {(widths[name], share) for name, share in found.items() if name.split(".")[2] == block}
        assert len(zeros) == len({width for width, _ in zeros}), "linears of one width have one sparsity in a block"
    assert len({found[f"model.layers.{block}.self_attn.q_proj"] for block in (0, 1)}) == 2


# ---- what is refused

LAYERWISE = {"layerwise": "owl", "sparsity": 0.6, "calibration": TOKENS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layerwise": "als"}, "layerwise='als': allowed are none, owl"),
        ({"sparsity": None, "pattern": "2:4"}, "layerwise='owl': allowed is none with pattern='2:4'"),
        ({"outlier_threshold": 0}, "outlier_threshold=0: allowed is a number above 0"),
        ({"sparsity_range": 0.0}, "sparsity_range=0.0: allowed is a number above 0 by which sparsity=0.6 can be"),
        ({"sparsity_range": float("nan")}, "sparsity_range=nan: allowed"),
        ({"sparsity": 0.05}, "sparsity_range=0.08: allowed is a number above 0 by which sparsity=0.05 can be"),
        ({"sparsity": 0.92}, "sparsity_range=0.08: allowed is a number above 0 by which sparsity=0.92 can be"),
        ({"pruner": "magnitude", "calibration": None}, "calibration: got None"),
    ],
)
def test_bad_requests_are_one_line_and_change_nothing(change, message) -> None:
    model, dense = make_tiny_llama(), make_tiny_llama()
    with pytest.raises(ValueError, match=message) as refused:
        lors.prune(model, **LAYERWISE | change)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pattern='2:4'",), r"prune\.layerwise='owl': allowed is none with pattern='2:4'"),
        (("sparsity=0.95",), r"prune\.sparsity_range=0\.08: allowed is a number above 0 by which sparsity=0\.95"),
        (("prune.outlier_threshold=0",), r"prune\.outlier_threshold=0: must be a number > 0"),
        (("prune.layerwise=als",), r"prune\.layerwise=als: must be one of none, owl"),
    ],
)
def test_bad_configs_are_one_line(composed, overrides, message) -> None:
    with pytest.raises(BadInput, match=message):
        resolve(composed("prune.layerwise=owl", *overrides))


# ---- the bench and the command


def test_it_is_in_the_key_where_it_does_something_and_nowhere_else(composed) -> None:
    def key(*overrides: str) -> str:
        return run_key(resolve(composed("method=none", *overrides)))

    assert key("prune.outlier_threshold=7.0", "prune.sparsity_range=0.05") == key()
    for words in (("mode=simulate",), ("sparsity=0",), ("mode=profile", "method=lors", "pattern='2:4'")):
        assert key(*words, "prune.layerwise=owl") == key(*words)
    owl = ("prune.layerwise=owl", "prune.outlier_threshold=5.0")
    assert len({key(), key(*owl), key(*owl, "prune.sparsity_range=0.05"), key("prune.layerwise=owl")}) == 3
    old = resolve(composed("method=none", *owl))  # as a run that knew none of the limits would have recorded it
    del old.prune["outlier_threshold"], old.prune["sparsity_range"]
    assert run_key(old) == key(*owl)
    asked = {"layerwise": "owl", "outlier_threshold": 5.0, "sparsity_range": 0.08}
    assert pruner_options(resolve(composed(*owl))) == asked
    assert pruner_options(resolve(composed())) == {}


def test_a_run_keeps_its_zeros_and_shows_the_sparsity_of_its_blocks(tiny, no_network, capsys) -> None:  # noqa: F811
    cfg = tiny(
        "method=lors", "sparsity=0.6", "prune.layerwise=owl", "prune.outlier_threshold=2.0", "save_merged=true", *SHORT
    )
    result = execute(cfg)
    assert result["status"] == "ok", result["error"]
    zeros = result["zeros"]
    assert result["pruner"] == "wanda-owl" and zeros["mergeable"] and zeros["lost"] == 0
    assert zeros["requested"] == 0.6 and zeros["after_prune"] == pytest.approx(0.6, abs=1 / 32)
    merged = AutoModelForCausalLM.from_pretrained(folder_of(result, cfg) / "merged")
    weights = [[linear.weight.flatten() for linear in linears.values()] for linears in by_block(merged).values()]
    found = [(torch.cat(block) == 0).double().mean().item() for block in weights]
    assert zeros["blocks"] == pytest.approx(found, abs=1e-3)
    low, high = sorted(zeros["blocks"])
    assert 0.6 - 0.08 - 1 / 32 < low < 0.59 and 0.61 - 1 / 32 < high < 0.6 + 0.08
    assert f"({low:.2%} to {high:.2%} of a block)" in capsys.readouterr().out


def test_the_command_prunes_as_the_function(tmp_path: Path, tiny_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:5] *= 20
    model.save_pretrained(tmp_path / "dense")
    for file in tiny_checkpoint.glob("token*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": sentence(i, 40)} for i in range(20)])
    words = f"prune {tmp_path}/dense {tmp_path}/out --pruner magnitude --layerwise owl --sparsity 0.6 --samples 4"
    assert command_line.main([*words.split(), "--length", "16", "--calibration", str(texts)]) == 0
    found = lors.check(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))["layers"]
    first, second = ({share for name, share in found.items() if name.split(".")[2] == block} for block in "01")
    assert max(first) < 0.6 < min(second), json.dumps(found)
