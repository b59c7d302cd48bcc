"""One YAML, two forms: every method whose config has `keep_zeros` also without it, as its paper has it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contract import batch, having, logits, method_of, pruned, trainable, trained
from peft import LoraConfig

from baselines.masked_lora import MaskedLoraConfig
from harness.method import Method, adapt, finish
from lors.sparsity import supports, zero_report


def has_switch(method: Method) -> bool:
    return method.peft is not None and "keep_zeros" in {field.name for field in dataclasses.fields(method.peft)}


BOTH = having(has_switch)


@pytest.mark.parametrize("name", BOTH)
def test_the_switch_alone_decides_about_zeros_and_end_states(name):
    kept, lost = method_of(name), method_of(name, "method.peft.keep_zeros=false")
    assert (kept.keep_zeros, kept.merges) == (True, ("merged",))
    assert (lost.keep_zeros, lost.merges) == (False, ("adapter", "remasked", "dense"))


@pytest.mark.parametrize("name", BOTH)
def test_without_it_the_start_is_the_pruned_model_and_the_merges_are_those_of_lora(name):
    method, before = method_of(name, "method.peft.keep_zeros=false"), supports(pruned())
    assert torch.equal(logits(adapt(method, pruned(), [batch()]).eval()), logits(pruned()))
    model = trained(method, pruned())
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(pruned()))
    ends = {variant: finish(method, model, before, variant) for variant in method.merges}
    torch.testing.assert_close(logits(ends["dense"]), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(ends["remasked"]), expected, atol=1e-3)
    lost = {variant: zero_report(before, end, "unstructured")["lost"] for variant, end in ends.items()}
    assert lost["remasked"] == lost["adapter"] == 0 < lost["dense"]


@pytest.mark.parametrize("name", BOTH)
def test_both_forms_train_the_same_parameters(name):
    kept, lost = (
        adapt(method, pruned(), [batch()])
        for method in (method_of(name), method_of(name, "method.peft.keep_zeros=false"))
    )
    assert trainable(kept).keys() == trainable(lost).keys()
    for key, parameter in trainable(kept).items():
        assert torch.equal(parameter, trainable(lost)[key])


def test_a_contradiction_is_one_clear_line():
    with pytest.raises(ValueError, match=r"^method\.keep_zeros=True: contradicts method\.peft\.keep_zeros=False$"):
        Method(name="both", peft=MaskedLoraConfig(keep_zeros=False), keep_zeros=True)
    with pytest.raises(ValueError, match=r"^dropout=0\.1: must be 0 with keep_zeros=true"):
        MaskedLoraConfig(dropout=0.1)
    with pytest.raises(ValueError, match=r"^keep_zeros='no': must be True or False$"):
        MaskedLoraConfig(keep_zeros="no")
    assert Method(name="lora", peft=LoraConfig()).keep_zeros  # PEFT's configs have no such field
