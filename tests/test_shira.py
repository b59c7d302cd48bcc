"""SHiRA on the support: every trained entry is a surviving weight, the draw is seeded, and PEFT can load it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn

from baselines.shira import SupportShiraConfig, support_mask

IN, OUT = 20, 12


def half_sparse_linear() -> nn.Linear:
    layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    layer.weight[:, ::2] = 0.0
    return layer


def two_layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: half_sparse_linear() for name in ("q_proj", "k_proj")})


def test_entries_are_survivors_of_the_wanted_number_and_follow_the_seed():
    layer = half_sparse_linear()
    masks = [support_mask(layer, 2, random_seed=seed) for seed in (0, 0, 1)]
    for mask in masks:
        assert mask.sum() == 2 * (IN + OUT)
        assert (layer.weight[mask] != 0).all()
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_all_survivors_are_equally_likely():
    layer = half_sparse_linear()
    torch.manual_seed(0)
    counts = sum(support_mask(layer, 1).int() for _ in range(500))
    # 500 draws of 32 of the 120 survivors: 133 each, standard deviation below 10.
    assert (counts[layer.weight == 0] == 0).all()
    assert ((counts[layer.weight != 0] - 133).abs() < 50).all()


def test_layers_draw_different_entries():
    model = get_peft_model(two_layers(), SupportShiraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    first, second = (model.base_model.model[name].shira_indices["default"] for name in ("q_proj", "k_proj"))
    assert first.shape == (2, 2 * (IN + OUT))
    assert not torch.equal(first, second)


def test_plain_peft_loads_the_entries_and_their_values(tmp_path):
    model = get_peft_model(two_layers(), SupportShiraConfig(r=2, target_modules=["q_proj"]))
    trained = model.base_model.model["q_proj"]
    nn.init.normal_(trained.shira_weight["default"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(two_layers(), tmp_path)
    assert type(loaded.peft_config["default"]) is ShiraConfig
    assert "mask_fn" not in json.loads((tmp_path / "adapter_config.json").read_text())
    x = torch.randn(3, IN)
    assert torch.equal(loaded.base_model.model["q_proj"](x), trained(x))


def test_more_entries_than_survivors_is_one_clear_line():
    support_mask(half_sparse_linear(), 3)  # 3 x 32 = 96 of 120
    with pytest.raises(ValueError, match=r"^r=4: .* = 128 weights .* 20 -> 12 .* at most 3 here$"):
        get_peft_model(two_layers(), SupportShiraConfig(r=4, target_modules=["q_proj"]))
