"""How far the straight-through gradients of LoRS are from the exact ones, at the start and at the end of its runs.

For every finished run with ``method=lors`` below the given folders, on the first batches of its training data, over the
factors A and B of all layers together (``lors.gradients``):

    cosine         of the angle between straight-through and exact gradients
    ratio          of their lengths, |straight-through| / |exact|
    off_support    |(1 - M) (.) (B A)|^2 / |B A|^2, the share of the update that the mask takes away; none at the start

Writes ``angles.csv``, a row for each run and place; ``python -m analysis gap`` holds it beside what the runs scored.

    python -m harness.gradient_angles runs/gradient_gap --output runs/reference/gradient_gap
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm

from harness.bfloat16_products import bfloat16_products
from harness.data import Batch, Row
from harness.environment import default_device
from harness.errors import BadInput
from harness.files import write_text, writing
from harness.inputs import read_inputs
from harness.method import adapt
from harness.method_from_config import build_method
from harness.models import Models
from harness.recipe import batch_loss
from harness.store import read_result
from harness.weights import base_format, load_weights
from lors.sparse_layer import active_layers
from lors.tuner import LorsLinear

__all__ = ["angles", "main", "of_run"]

FILE = "angles.csv"


def angles(model: nn.Module, batches: Sequence[Batch], autocast: bool = False) -> dict[str, float | None]:
    """The three numbers of the module's text, in the order above, for a model with LoRS adapters.

    Args:
        model: Its gradients are gone afterwards.
        batches: Their gradients are added up.
        autocast: Whether the passes run under autocast to bfloat16, as ``train.precision`` says.
    """
    straight, exact = (_gradient(model, batches, how, autocast) for how in ("straight_through", "exact"))
    kept = update = 0.0
    for layer, name in active_layers(model, LorsLinear):
        W = layer.get_base_layer().weight
        change = layer.update(name, torch.float32)
        update += change.square().sum().item()
        kept += change[W != 0].square().sum().item()
    return {
        "cosine": torch.cosine_similarity(straight, exact, dim=0).item(),
        "ratio": (straight.norm() / exact.norm()).item(),
        "off_support": 1 - kept / update if update else None,
    }


def _gradient(model: nn.Module, batches: Sequence[Batch], how: str, autocast: bool) -> Tensor:
    """Of all factors, one after the other, in float64."""
    layers = list(active_layers(model, LorsLinear))
    configs = {id(layer.options[name]): layer.options[name] for layer, name in layers}.values()
    before = [config.gradient for config in configs]
    model.zero_grad()
    try:
        for config in configs:
            config.gradient = how
        for batch in batches:
            batch_loss(model, batch, micro_batches=len(batches), autocast=autocast).backward()
    finally:
        for config, gradient in zip(configs, before, strict=True):
            config.gradient = gradient
    factors = [factor for layer, name in layers for factor in layer.factors(name)]
    gradient = torch.cat([factor.grad.double().flatten() for factor in factors])
    model.zero_grad()
    return gradient


def of_run(folder: Path, batches: int) -> list[dict[str, Any]]:
    """Rows of ``angles.csv`` for a finished run of LoRS: at its start, and at its end if its adapter is there.

    Args:
        folder: That of the run.
        batches: So many of the training data in its order before it is shuffled.
    """
    cfg = OmegaConf.load(folder / "config.yaml")
    method = build_method(cfg)
    inputs = read_inputs(cfg, method)
    bf16, device = cfg.train.precision == "bf16_mixed", default_device()

    def batched(rows: Sequence[Row]) -> list[Batch]:
        size = cfg.train.batch_size
        cut = (inputs.pad(rows[start : start + size]) for start in range(0, len(rows), size))
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in cut]

    data = batched(inputs.rows[: batches * cfg.train.batch_size])
    pruned = Models(cfg, inputs).pruned()
    options = {"dtype": base_format(cfg), **pruned.options}
    with bfloat16_products(device, bf16):
        model = load_weights(pruned.path, pruned.revision, shown=pruned.shown, **options)
        first = batched(inputs.rows[: cfg.train.init_rows])
        model = adapt(method, model, first, cfg.seed, precision=cfg.train.precision)
        found = [{"key": folder.name, "place": "start"} | angles(model, data, bf16)]
        if (folder / "adapter").is_dir():
            set_peft_model_state_dict(model, load_peft_weights(str(folder / "adapter"), device=str(device)))
            found.append({"key": folder.name, "place": "end"} | angles(model, data, bf16))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure and write; exit code 0, or 2 after one line about bad input."""
    parser = argparse.ArgumentParser(prog="python -m harness.gradient_angles", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders with runs below")
    parser.add_argument("--batches", type=int, default=8, help="of the training data; default: 8")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    options = parser.parse_args(arguments)
    try:
        if options.batches < 1:
            raise ValueError(f"--batches {options.batches}: must be a whole number >= 1")
        files = [file for place in options.runs for file in sorted(place.rglob("result.json"))]
        results = {file.parent: read_result(file) for file in files}
        folders = [
            folder for folder, result in results.items() if result["method"] == "lors" and result["status"] == "ok"
        ]
        if not folders:
            raise ValueError(f"runs={', '.join(map(str, options.runs))}: no finished run of method=lors below")
        rows = [row for folder in tqdm(folders, unit="run") for row in of_run(folder, options.batches)]
        with writing("--output", options.output):
            write_text(options.output / FILE, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    except (BadInput, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
