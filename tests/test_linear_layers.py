"""What counts as a linear layer: one predicate for the pruner and the tuners, and what hangs on a layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES
from peft import get_peft_model
from pruned_models import IDS, adapted_model, logits, pruned_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers.models.falcon.modeling_falcon import FalconLinear

import lors
from baselines.spp import SppConfig
from lors.blocks import linear_fault, reads_weight
from lors.pruning import prune_model


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SaysTheSame(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Quantised(Tensor):
    """A weight that says it is float32 and is something else, as torchao's are."""


def patched(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: x
    return layer


def packed(layer: nn.Linear) -> nn.Linear:
    """As compressed-tensors keeps four bits."""
    del layer.weight
    layer.weight_packed = nn.Parameter(torch.zeros(4, 1, dtype=torch.int32), requires_grad=False)
    return layer


def of_int8(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return layer


def of_a_subclass(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)
    return layer


def with_mask(layer: nn.Linear) -> nn.Linear:
    return prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_mask, r"call torch\.nn\.utils\.prune\.remove\(layer, 'weight'\) first"),
        (parametrizations.orthogonal, r"call torch\.nn\.utils\.parametrize\.remove_parametrizations\(layer, 'wei"),
        (weight_norm, r"call torch\.nn\.utils\.remove_weight_norm\(layer\) first"),
        (spectral_norm, r"call torch\.nn\.utils\.remove_spectral_norm\(layer\) first"),
        (patched, "has a forward function that somebody has put in place of its own: restore that first"),
        (packed, "has no weight but .*weight_packed"),
        (of_int8, r"is quantised \(torch\.int8\)"),
        (of_a_subclass, r"is quantised \(Quantised\)"),
        (lambda _: Doubled(32, 32), "is of type Doubled, which computes something else"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # old norms are deprecated
def test_pruner_and_tuner_refuse_the_same_layers(change: Callable, message: str) -> None:
    model = pruned_model()
    place = model.model.layers[1].self_attn
    place.q_proj = change(place.q_proj)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [id(part) for part in model.modules()]
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.self_attn\.q_proj.*{message}") as pruning:
        prune_model(model, "magnitude", sparsity=0.7, pattern="unstructured", calibration=None)
    for config in (lors.LorsConfig(r=2), SppConfig(r=2)):
        with pytest.raises(ValueError, match=rf"'model\.layers\.1\.self_attn\.q_proj' .*{message}") as adapting:
            get_peft_model(model, config)
        assert "\n" not in f"{pruning.value}{adapting.value}"
    assert [id(part) for part in model.modules()] == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_weight_is_one_again_once_what_derives_it_is_removed() -> None:
    for layer, undo in (
        (with_mask(nn.Linear(4, 4)), lambda layer: prune.remove(layer, "weight")),
        (parametrizations.orthogonal(nn.Linear(4, 4)), lambda x: parametrize.remove_parametrizations(x, "weight")),
    ):
        assert linear_fault(layer) is not None
        undo(layer)
        assert linear_fault(layer) is None


@pytest.mark.parametrize("kind", [nn.Linear, SaysTheSame, FalconLinear])
def test_a_subclass_that_computes_the_same_is_a_linear_layer(kind: type[nn.Linear]) -> None:
    assert linear_fault(kind(4, 3)) is None
    assert linear_fault(kind(4, 3, bias=False).to("meta")) is None


# ---- layers whose parent reads their weight


def test_what_reads_a_weight_is_found_in_the_source() -> None:
    mixer = ARCHITECTURES["mamba"].build().backbone.layers[0].mixer
    read = [name for name, _ in mixer.named_children() if reads_weight(mixer, name)]
    assert read == ["conv1d", "x_proj", "dt_proj", "out_proj"]
    assert reads_weight(nn.MultiheadAttention(8, 2), "out_proj")
    block = pruned_model().model.layers[0]
    assert not any(reads_weight(part, "q_proj") for part in (block, block.self_attn))


class Reader(nn.Module):
    """Reads one weight in a way that no source tells."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = dict(self.named_parameters())
        weight = weight.get("read.weight", weight.get("read.base_layer.weight"))
        return self.called(x @ weight.T)


def test_an_adapter_without_a_gradient_is_named_after_the_first_backward_pass() -> None:
    model, other = (get_peft_model(Reader(), lors.LorsConfig(r=2, target_modules=["read", "called"])) for _ in "12")
    with pytest.warns(UserWarning, match="1 of 2 adapted layers had no gradient in the first backward pass: read"):
        model(torch.randn(3, 8)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(torch.randn(3, 8)).sum().backward()  # it is said once
        other.base_model.adapted_layers("default")["read"].requires_grad_(False)
        other(torch.randn(3, 8)).sum().backward()  # what somebody has frozen is not meant to learn


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_one_backward_pass_with_the_same_gradients(reentrant: bool) -> None:
    """A re-entrant checkpoint runs a backward pass of its own for every block."""
    plain, model = adapted_model().train(), adapted_model().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*had no gradient")
        for each in (plain, model, plain, model):
            each(input_ids=IDS, labels=IDS).loss.backward()
    assert not model.base_model._first_backward._handles
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert one.requires_grad == (one.grad is not None)
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("change", [patched, with_mask])
def test_a_layer_that_is_changed_later_is_not_merged(change: Callable) -> None:
    """The merge would be lost, or another function."""
    model = get_peft_model(pruned_model(), lors.LorsConfig(r=2))
    change(model.base_model.model.model.layers[1].mlp.up_proj.base_layer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj has a .*; nothing was merged"):
            merge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_factors_on_another_device_than_the_weight_are_refused() -> None:
    x, W, A, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4, device="meta"), torch.ones(3, 1)
    with pytest.raises(ValueError, match="devices differ: x cpu, weight cpu, A meta, B cpu"):
        lors.masked_linear(x, W, A, B, 1.0)


def test_a_model_that_is_watched_can_be_copied_and_saved_whole(tmp_path) -> None:
    model = adapted_model()
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(other.eval()), logits(model.eval()))
        other.train()(input_ids=IDS, labels=IDS).loss.backward()
