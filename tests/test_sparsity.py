"""Patterns, supports, the merge that keeps zeros, and the search for the decoder's linears."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from conftest import make_tiny_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lors.blocks import decoder_blocks, decoder_linears
from lors.sparsity import (
    check_width,
    follows_pattern,
    lowest,
    masked_merge,
    parse_pattern,
    random_support,
    resolve_sparsity,
    sparsity_of,
    supports,
    zero_report,
)

REPEATABLE = settings(deadline=None, derandomize=True)
PATTERNS = st.tuples(st.integers(1, 7), st.integers(2, 8)).filter(lambda p: p[0] < p[1])


# ---- patterns


@pytest.mark.parametrize(
    ("sparsity", "pattern", "expected"),
    [
        (None, "unstructured", 0.5),
        (0, "unstructured", 0.0),
        (0.7, "unstructured", 0.7),
        (0.5, "2:4", 0.5),
        (0.333, "2:3", 1 / 3),
        (None, "1:4", 0.75),  # NVIDIA's reading; the reference code would prune one of four
    ],
)
def test_resolved_sparsity(sparsity, pattern, expected):
    assert resolve_sparsity(sparsity, pattern) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2-4", "2:4 ", "", "half", "²:4", 124, None])
def test_bad_pattern_is_named(text):
    with pytest.raises(ValueError, match=r"pattern=.*allowed are unstructured and 'n:m'"):
        parse_pattern(text)


def test_sparsity_and_width_that_do_not_fit_are_named():
    for sparsity in (-0.1, 1.0, 1.5, math.nan, math.inf, "0.5", True):
        with pytest.raises(ValueError, match=r"sparsity=.*0 <= sparsity < 1"):
            resolve_sparsity(sparsity, "unstructured")
    for sparsity in (0.0, 0.49, 0.25):
        with pytest.raises(ValueError, match=f"sparsity={sparsity} contradicts pattern='2:4'"):
            resolve_sparsity(sparsity, "2:4")
    check_width("2:4", 12)
    check_width("unstructured", 7)
    with pytest.raises(ValueError, match="groups of 4 do not divide the input width 6"):
        check_width("2:4", 6)


# ---- selection and random supports


@REPEATABLE
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=24), st.data())
def test_lowest_is_a_stable_sort(values, data):
    count = data.draw(st.integers(0, len(values)))
    first = sorted(range(len(values)), key=lambda i: values[i])[:count]  # Python's sort is stable
    chosen = lowest(torch.tensor(values, dtype=torch.float32), count)
    assert chosen.nonzero().flatten().tolist() == sorted(first)
    # Infinities, and every slice alone.
    score = torch.tensor([[math.inf, math.inf, 1.0], [-math.inf, 0.0, -math.inf]])
    assert lowest(score, 2).tolist() == [[True, False, True], [True, False, True]]


@REPEATABLE
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
@example(100, 200, 1e-4, 0)
@example(100, 200, 1 - 1e-4, 0)
def test_random_support_is_exact(rows, width, sparsity, seed):
    M = random_support((rows, width), sparsity, "unstructured", torch.Generator().manual_seed(seed))
    assert M.dtype == torch.bool
    assert M.shape == (rows, width)
    assert int((~M).sum()) == int(rows * width * sparsity)


@REPEATABLE
@given(PATTERNS, st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_random_support_fills_every_group(nm, rows, groups, seed):
    n, m = nm
    M = random_support((rows, groups * m), None, f"{n}:{m}", torch.Generator().manual_seed(seed))
    assert (M.view(rows, groups, m).sum(-1) == n).all()
    assert follows_pattern(M.float(), f"{n}:{m}")


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.67), ("2:6", None)])
def test_random_support_is_seeded_and_uniform(pattern, sparsity):
    generator = torch.Generator()

    def draw() -> torch.Tensor:
        return random_support((1, 6), sparsity, pattern, generator).flatten()

    generator.manual_seed(3)
    once = [draw() for _ in range(3000)]
    generator.manual_seed(3)
    assert all(torch.equal(M, draw()) for M in once[:50])
    # Two kept of six: fifteen supports, each expected 200 times with a standard deviation of 13.7.
    counts = Counter(tuple(M.nonzero().flatten().tolist()) for M in once)
    assert len(counts) == math.comb(6, 2)
    assert all(abs(count - 200) < 4 * 13.7 for count in counts.values())


def test_pattern_of_a_weight():
    weight = torch.tensor([[1.0, 0.0, -0.0, 2.0, 0.0, 0.0, 0.0, 3.0]])  # -0.0 is a zero
    assert follows_pattern(weight, "2:4")
    assert not follows_pattern(weight, "1:4")
    assert follows_pattern(weight, "1:2")
    assert not follows_pattern(weight.roll(1), "1:2")  # groups are aligned
    assert not follows_pattern(weight, "1:3")  # 3 does not divide 8
    assert follows_pattern(torch.ones(2, 5), "unstructured")


# ---- the merge


@REPEATABLE
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_masked_merge_rounds_once_and_keeps_zeros(dtype, delta_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(7, 5, generator=generator)
    W = (W * random_support((7, 5), 0.4, "unstructured", generator)).to(dtype)
    delta = torch.randn(5, 7, generator=generator).to(delta_dtype).T  # not contiguous
    merged = masked_merge(W, delta)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (W.to(exact) + delta.to(exact)).to(dtype) * (W != 0)
    assert merged.dtype == dtype
    assert torch.equal(merged, expected)
    assert not (merged[W == 0]).any()
    # What the mask hides does not count, whatever it is.
    W, delta = torch.tensor([[0.0, -0.0, 1.0]]), torch.tensor([[math.inf, math.nan, 2.0]])
    assert masked_merge(W, delta).tolist() == [[0.0, 0.0, 3.0]]
    with pytest.raises(ValueError, match="delta has shape"):
        masked_merge(W, delta.T)


# ---- reports


def test_zero_report_counts_what_a_merge_lost_and_gained():
    model = make_tiny_llama()
    for linear in decoder_linears(model).values():
        linear.weight.data *= random_support(linear.weight.shape, 0.5, "2:4", torch.Generator().manual_seed(1))
    before = supports(model)
    total = sum(M.numel() for M in before.values())
    assert sparsity_of(model) == 0.5
    clean = {"after_prune": 0.5, "after_merge": 0.5, "lost": 0, "gained": 0, "pattern_valid": True}
    assert zero_report(before, model, "2:4") == clean

    W = decoder_linears(model)["model.layers.1.mlp.up_proj"].weight.data
    lost, gained = (W == 0).nonzero()[0], (W != 0).nonzero()[:2]
    W[lost[0], lost[1]] = 1.0
    W[gained[:, 0], gained[:, 1]] = 0.0
    report = zero_report(before, model, "2:4")
    assert (report["lost"], report["gained"]) == (1, 2)
    assert report["after_merge"] == pytest.approx(0.5 + 1 / total, abs=1e-12)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    assert not zero_report(before, model, "2:4")["pattern_valid"]
    with pytest.raises(ValueError, match="another model"):
        zero_report({"model.layers.0.mlp.up_proj": before["model.layers.0.mlp.up_proj"]}, model, "2:4")


def test_supports_look_through_adapters():
    model = make_tiny_llama()
    before = supports(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["k_proj"]))
    for shell in (wrapped, wrapped.base_model, wrapped.base_model.model):
        assert list(supports(shell)) == list(before)  # and no adapter matrix among them
    assert len(before) == 14


# ---- blocks


def test_decoder_linears_of_llama():
    model = make_tiny_llama()
    name, blocks = decoder_blocks(model)
    assert name == "model.layers"
    assert blocks is model.model.layers
    names = list(decoder_linears(model))
    assert len(names) == 14
    assert names[:7] == [
        *(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"),
        *(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")),
    ]
    assert all(model.get_submodule(name) is linear for name, linear in decoder_linears(model).items())
    # A list inside a block may be as long as the list of blocks.
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert decoder_blocks(model)[0] == "model.layers"
    assert "model.layers.0.mlp.experts.1" in decoder_linears(model)


def test_models_without_one_list_of_decoder_blocks_are_refused():
    with pytest.raises(ValueError, match="Linear has no config"):
        decoder_blocks(nn.Linear(2, 2))
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    with pytest.raises(ValueError, match="encoder-decoder"):
        decoder_blocks(t5)
    model = make_tiny_llama()
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"cannot tell its list of 3 decoder blocks \(candidates: none\)"):
        decoder_blocks(model)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    twins = BertLMHeadModel(BertConfig(**sizes, vocab_size=32, is_decoder=True))
    twins.vision = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match=r"candidates: bert\.encoder\.layer, vision"):
        decoder_blocks(twins)
