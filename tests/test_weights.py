"""A checkpoint whose weights are not all there, or not all of it, is refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.environment import default_device
from harness.errors import BadInput
from harness.weights import load_weights

Weights = dict[str, Tensor]


def changed(folder: Path, copy: Path, edit: Callable[[Weights], Weights] | None = None, **config: object) -> Path:
    """A copy of a model folder with other weights, or another config."""
    shutil.copytree(folder, copy)
    if edit is not None:
        save_file(edit(load_file(copy / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return copy


def without_head(W: Weights) -> Weights:
    return {name: tensor for name, tensor in W.items() if "lm_head" not in name}


def renamed(W: Weights) -> Weights:
    return {f"base_model.model.{name}": tensor for name, tensor in W.items()}


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (without_head, {}, r"1 missing .*lm_head"),
        (renamed, {}, r"21 missing .*\(lm_head.weight, .*, \.\.\.\); 21 that the model does not have \(base_model.*\)"),
        (None, {"intermediate_size": 64}, r"6 of another shape .*down_proj"),
    ],
)
def test_weights_that_do_not_belong_to_the_config(tiny_checkpoint, tmp_path, edit, config, message) -> None:
    """As they are loaded; `bad_inputs` has what is found by their names alone."""
    folder = changed(tiny_checkpoint, tmp_path / "model", edit, **config)
    with pytest.raises(BadInput, match=message) as refusal:
        load_weights(str(folder), shown="model.path=here")
    assert str(refusal.value).startswith("model.path=here: ") and "\n" not in str(refusal.value)


def test_a_tied_head_is_not_missing(tiny_checkpoint, tmp_path) -> None:
    folder = changed(tiny_checkpoint, tmp_path / "model", without_head, tie_word_embeddings=True)
    model = load_weights(str(folder), shown="here")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("places", ["auto", "sequential", {"": default_device().type}])
def test_a_device_map_that_keeps_all_weights_on_the_device_of_the_run(tiny_checkpoint, places) -> None:
    model = load_weights(str(tiny_checkpoint), shown="here", device_map=places)
    assert {tensor.device.type for tensor in model.parameters()} == {default_device().type}


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"model.embed_tokens": "cpu", "model.layers.0": "meta"}, "does not fit this model"),
        ({"": "nowhere"}, "does not fit this model"),
        ({"": "meta"}, "must leave all weights on .*, not on the CPU or the disk"),
    ],
)
def test_a_device_map_that_cannot_work_is_named(tiny_checkpoint, places, said) -> None:
    with pytest.raises(BadInput, match=rf"model.device_map=.*: {said}"):
        load_weights(str(tiny_checkpoint), shown="here", device_map=places)
