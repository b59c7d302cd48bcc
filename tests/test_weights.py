"""A checkpoint whose weights are not all there, or not all of it, is refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import BadInput
from harness.weights import load_weights

Weights = dict[str, Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


def changed(folder: Path, copy: Path, edit: Callable[[Weights], Weights] | None = None, **config: object) -> Path:
    """A copy of a model folder with other weights, or another config."""
    shutil.copytree(folder, copy)
    if edit is not None:
        save_file(edit(load_file(copy / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return copy


CASES = {
    "a weight is missing": (lambda W: {n: t for n, t in W.items() if n != DOWN}, {}, rf"1 missing .*\({DOWN}\)"),
    "the head is missing": (lambda W: {n: t for n, t in W.items() if "lm_head" not in n}, {}, r"1 missing .*lm_head"),
    "all keys are renamed": (
        lambda W: {f"base_model.model.{n}": t for n, t in W.items()},
        {},
        r"21 missing .*\(lm_head.weight, .*, \.\.\.\); 21 that the model does not have \(base_model.*\)",
    ),
    "more layers": (None, {"num_hidden_layers": 3}, r"9 missing .*model.layers.2.input_layernorm.weight"),
    "fewer layers": (None, {"num_hidden_layers": 1}, r"9 that the model does not have \(model.layers.1"),
    "another width": (None, {"intermediate_size": 64}, r"6 of another shape .*down_proj"),
    "an encoder": (None, {"model_type": "bert", "architectures": ["BertModel"]}, r"missing .*bert"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"device_map": "meta"}], ids=["loaded", "looked at"])
def test_weights_that_do_not_belong_to_the_config(tiny_checkpoint, tmp_path, case: str, options: dict) -> None:
    edit, config, message = CASES[case]
    folder = changed(tiny_checkpoint, tmp_path / "model", edit, **config)
    with pytest.raises(BadInput, match=message) as refusal:
        load_weights(str(folder), shown="model.path=here", **options)
    assert str(refusal.value).startswith("model.path=here: ") and "\n" not in str(refusal.value)


def test_a_tied_head_is_not_missing(tiny_checkpoint, tmp_path) -> None:
    drop = CASES["the head is missing"][0]
    folder = changed(tiny_checkpoint, tmp_path / "model", drop, tie_word_embeddings=True)
    model = load_weights(str(folder), shown="here")
    assert model.lm_head.weight is model.model.embed_tokens.weight
