"""The weights of a model: those of a checkpoint, all of them or none (transformers fills what it lacks with random
numbers and goes on), or random ones for mode=profile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from harness.environment import default_device
from harness.errors import BadInput, one_line
from harness.method import PRECISIONS
from harness.refusals import as_written
from lors.blocks import decoder_linears
from lors.quantized_file import FILE, load_quantized
from lors.sparsity import random_support
from lors.storage import CompressedLinear

__all__ = ["base_format", "check_files", "checksum", "load_weights", "random_model"]

NAMED = 3  # weights that a message names
# Of safetensors: what a weight may be stored as. Anything else is a number that a scale beside it belongs to.
FORMATS = ("F64", "F32", "F16", "BF16")
INDEX = ".index.json"
NO_ZERO = 1e-3


def base_format(cfg: DictConfig) -> torch.dtype:
    """Format of the weights of a model while it is fine-tuned and scored."""
    chosen = OmegaConf.select(cfg, "model.dtype")
    return PRECISIONS[cfg.train.precision].base if chosen is None else getattr(torch, chosen)


def load_weights(
    path: str, revision: str | None = None, *, shown: str, device: torch.device | None = None, **options: Any
) -> PreTrainedModel:
    """A model, for evaluation, whose every weight comes from its checkpoint, and whose checkpoint holds no other ones.

    Args:
        path: Folder, or name on the Hub.
        revision: On the Hub.
        shown: What the message says of where it comes from, such as ``model.path=here``.
        device: Where the model is; None: on the device of the run. On the CPU its weights are pages of its files until
            they are changed, unless their format is.
        options: Of ``from_pretrained``; ``device_map="meta"`` reads names and shapes only.

    Raises:
        BadInput: Weights are missing, or left over, or have another shape; a ``device_map`` that cannot be, or leaves
            some of them elsewhere.
    """
    places = options.get("device_map")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the others
            trust_remote_code=False,
            **options,
        )
    except (ValueError, RuntimeError) as error:
        if places in (None, "meta"):
            raise
        raise BadInput(f"model.device_map={as_written(places)}: does not fit this model ({one_line(error)})") from error
    wrong = [
        f"{len(names)} {what} ({_first(names)})"
        for key, what in (
            ("missing_keys", "missing from the files"),
            ("unexpected_keys", "that the model does not have"),
            ("mismatched_keys", "of another shape than config.json says"),
        )
        if (names := sorted(_name(entry) for entry in report[key]))
    ]
    if wrong or report.get("error_msgs"):
        found = "; ".join(wrong) or " ".join(report["error_msgs"])
        raise BadInput(f"{shown}: config.json and weights do not belong together: weights {found}")
    if places == "meta":
        return model.eval()
    if (Path(path) / FILE).is_file():
        try:
            load_quantized(model, path)
        except ValueError as error:
            raise BadInput(str(error)) from error
    if places is not None:
        _check_places(model, places)
        return model.eval()
    return model.to(device or default_device()).eval()


def random_model(
    shape: PretrainedConfig,
    dtype: torch.dtype,
    sparsity: float,
    pattern: str,
    seed: int,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """A model with random weights and exactly this sparsity in its decoder linears, by default where the run is.

    It is made on the CPU, so that a seed means the same weights everywhere.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=False).eval()
    if sparsity > 0:
        generator = torch.Generator().manual_seed(seed)
        for linear in tqdm(decoder_linears(model).values(), desc="random sparsity", unit="layer"):
            M = random_support(tuple(linear.weight.shape), sparsity, pattern, generator)  # out x in
            # A weight that was drawn as zero, as half precision does now and then, would count as pruned.
            linear.weight.data.masked_fill_(linear.weight == 0, NO_ZERO).mul_(M)
    return model.to(device or default_device())


def checksum(model: nn.Module) -> list[int]:
    """The sum of every weight's bits, taken as a whole number: equal where the weights are."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    packed = [part for layer in model.modules() if isinstance(layer, CompressedLinear) for part in layer.packed.parts]
    weights = [*(p.detach() for p in model.parameters()), *packed]
    return [weight.contiguous().view(kinds[weight.element_size()]).sum().item() for weight in weights]


def check_files(folder: Path, model: PreTrainedModel, shown: str) -> None:
    """Refuse files of a model folder that transformers reads as something else than they are.

    Args:
        folder: The folder; nothing is checked if it is none.
        model: What `load_weights` made of it.
        shown: As there.

    Raises:
        BadInput: A weight stored as another format than a floating point number, which is taken without its scale; an
            index that names a file elsewhere, whose content is in no key.
    """
    if (folder / FILE).is_file():
        raise BadInput(
            f"{shown}: its weights are quantised ({FILE}): must be the model they were made of, with prune.quantize"
        )
    for file in folder.glob(f"*{INDEX}"):
        outside = [name for name in _files_of(file) if Path(name).name != name]
        if outside:
            raise BadInput(f"{shown}: {file.name} must name files beside it, not {outside[0]}")
    prefix = f"{model.base_model_prefix}."
    weights = {name.removeprefix(prefix) for name, _ in model.named_parameters()}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no mapping
                kind = stored.get_slice(name).get_dtype()
                if kind not in FORMATS and name.removeprefix(prefix) in weights:
                    raise BadInput(f"{shown}: {name} of {file.name} is stored as {kind}; must be {', '.join(FORMATS)}")


def _check_places(model: PreTrainedModel, places: Any) -> None:
    """Pruning and merging write weights, which those that are offloaded do not keep, and one device is measured."""
    device = default_device()
    elsewhere = {str(tensor.device) for tensor in model.parameters() if tensor.device != device}
    if elsewhere:
        where = ", ".join(sorted(elsewhere)).replace("meta", "the CPU or the disk")
        raise BadInput(f"model.device_map={as_written(places)}: must leave all weights on {device}, not on {where}")


def _files_of(index: Path) -> Iterator[str]:
    content = json.loads(index.read_text(encoding="utf-8"))
    files = content.get("weight_map") if isinstance(content, dict) else None
    yield from map(str, files.values() if isinstance(files, dict) else ())


def _name(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry[0])


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
