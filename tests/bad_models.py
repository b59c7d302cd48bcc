"""Bad model folders: copies of the good model of `bad_inputs` with one thing changed, and names of no model at all."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from bad_inputs import Bad, Change, entries
from safetensors.torch import load_file, save_file
from torch import Tensor


def config(**changes: object) -> Change:
    """Other entries of ``config.json``."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    change.__name__ = " ".join(f"{name}={value}" for name, value in changes.items())
    return change


def holds(name: str, content: str | bytes) -> Change:
    """Another content of a file."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    change.__name__ = f"{name} {content[:20]!r}"
    return change


def without(name: str) -> Change:
    """A file that is not there."""

    def change(folder: Path) -> None:
        (folder / name).unlink()

    change.__name__ = f"without {name}"
    return change


def weights(what: str, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    """Other weights."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(edit(load_file(file)), file, {"format": "pt"})

    change.__name__ = what
    return change


class _Code:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def broken(*changes: Change, says: str, slow: bool = False) -> Bad:
    """A model folder that is not as it should be."""
    return Bad(("model.path={here}/model",), ("model.path={here}/model: ", says), model=changes, slow=slow)


Q = "model.layers.0.self_attn.q_proj"
INDEX = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../weights.safetensors"}})
CODE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
TOKENIZER_CODE = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
NO_CONFIG, NO_TOKENIZER = "no usable config.json", "no usable tokenizer"
UNREADABLE, NO_MODEL = "its weights cannot be read", "makes no model that can be used"
MODELS = [
    *entries(
        ("model.path=./nowhere", "model.path=./nowhere: no such folder; must be a model folder or a name on the Hub"),
        (
            "model.path=nobody/nothing",
            "model.path=nobody/nothing: no such folder or snapshot, and the Hub gave " + NO_CONFIG,
        ),
        ("model.path={model}/config.json", "model.path={model}/config.json: is a file; must be a model folder"),
        ("model.path={sources}", "model.path={sources}: the folder has " + NO_CONFIG),
    ),
    broken(holds("config.json", '{"model_type": "lla'), says=NO_CONFIG),
    broken(config(model_type="t5"), says=NO_MODEL, slow=True),
    broken(config(hidden_act="nonsense"), says=NO_MODEL),
    broken(config(model_type="custom", auto_map=CODE), says="custom code"),
    broken(config(model_type="bert"), says="44 missing from the files"),
    broken(config(num_hidden_layers=0), says="without linear layers in decoder blocks"),
    broken(config(num_hidden_layers=3), says="9 missing from the files (model.layers.2.input_layernorm.weight"),
    broken(config(num_hidden_layers=1), says="9 that the model does not have (model.layers.1"),
    broken(config(intermediate_size=64), says="6 of another shape than config.json says"),
    broken(config(quantization_config={"quant_method": "gptq", "bits": 4}), says="must not be quantized"),
    broken(without("model.safetensors"), says="the folder has no weights (*.safetensors, *.bin)"),
    broken(holds("model.safetensors", "<html>not found</html>"), says=UNREADABLE),
    broken(without("model.safetensors"), holds("pytorch_model.bin", pickle.dumps(_Code())), says=UNREADABLE),
    broken(
        weights("no q_proj", lambda W: {k: w for k, w in W.items() if Q not in k}),
        says=f"1 missing from the files ({Q}",
    ),
    broken(
        weights("an adapter too", lambda W: W | {f"{Q}.lora_A.weight": torch.ones(4, 32)}),
        says=f"1 that the model does not have ({Q}.lora_A.weight)",
    ),
    broken(
        weights("int8", lambda W: {k: (100 * w).to(torch.int8) for k, w in W.items()}),
        says="is stored as I8; must be F64, F32, F16, BF16",
    ),
    broken(holds("model.safetensors.index.json", INDEX), says="index.json must name files beside it, not ../weights"),
    broken(holds("adapter_config.json", "{}"), says="must be a whole model; adapter_config.json says it is an adapter"),
    broken(without("tokenizer.json"), says="the folder has no tokenizer (tokenizer.json, tokenizer.model, vocab.json)"),
    broken(holds("tokenizer.json", "{}"), says=NO_TOKENIZER),
    broken(holds("tokenizer_config.json", json.dumps(TOKENIZER_CODE)), says="custom code"),
    broken(
        holds("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}'),
        says="its tokenizer cannot encode a text",
    ),
]
