"""Compressed weights beside the tools of others: base state dicts of PEFT, casts, copies, DDP."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_base_model_state_dict, set_base_model_state_dict
from pruned_models import KINDS, adapted_model, logits, pruned_model

import lors
from lors.storage import CompressedLinear


@pytest.mark.parametrize(("storage", "pattern"), KINDS.items())
def test_the_base_state_dict_is_that_of_the_dense_model(storage: str, pattern: str) -> None:
    plain = pruned_model(pattern=pattern)
    model = adapted_model(pruned_model(pattern=pattern), storage=storage)
    found, expected = get_base_model_state_dict(model), plain.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    pruned_model(pattern=pattern).load_state_dict(found)


@pytest.mark.parametrize(("storage", "pattern"), KINDS.items())
def test_another_base_can_be_loaded_into_it(storage: str, pattern: str) -> None:
    """With zeros in other places, and another number of them."""
    model = adapted_model(pruned_model(pattern=pattern), storage=storage)
    other = pruned_model(pattern=pattern)
    for name, parameter in other.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data = -parameter.data.flip(1)
            parameter.data[0] = 0
    expected = adapted_model(copy.deepcopy(other), storage="dense")
    set_base_model_state_dict(model, other.state_dict())
    torch.testing.assert_close(logits(model), logits(expected))
    assert any(isinstance(part, CompressedLinear) for part in model.modules())
    with pytest.raises(RuntimeError, match="Missing key"):
        set_base_model_state_dict(model, {})


def test_a_base_that_does_not_follow_the_pattern_is_refused() -> None:
    model = adapted_model(pruned_model(pattern="2:4"), storage="n:m")
    with pytest.raises((ValueError, RuntimeError), match="does not follow"):
        set_base_model_state_dict(model, pruned_model().state_dict())


@pytest.mark.parametrize(("storage", "pattern"), KINDS.items())
def test_saving_the_adapter_decodes_no_weight(storage: str, pattern: str, monkeypatch, tmp_path) -> None:
    model = adapted_model(pruned_model(pattern=pattern), storage=storage)
    monkeypatch.setattr(CompressedLinear, "weight", property(lambda self: pytest.fail("decoded")))
    model.save_pretrained(tmp_path)
    model.load_state_dict(model.state_dict())


def test_ddp_does_not_send_the_places_of_the_values_before_every_pass() -> None:
    model = adapted_model(storage="bitmap")
    buffers = {name for name, _ in model.named_buffers()}
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert len(ignored) == 2 * 14
    assert ignored <= buffers
    assert all(name.endswith((".bits", ".offsets")) for name in ignored)


def test_values_are_a_parameter_and_places_are_buffers() -> None:
    """FSDP1 cannot flatten whole numbers."""
    model = adapted_model(pruned_model(torch.bfloat16), storage="bitmap")
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    layer = next(part for part in model.modules() if isinstance(part, CompressedLinear))
    assert {name for name, _ in layer.named_buffers()} == {"bits", "offsets"}
    copied = copy.deepcopy(model).double()
    assert next(part for part in copied.modules() if isinstance(part, CompressedLinear)).bits.dtype == torch.uint8


def test_the_version_is_known() -> None:
    from importlib.metadata import version

    assert lors.__version__ == version("lors")
