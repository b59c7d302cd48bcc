"""Everything that a run reads before a model is loaded: shape, tokenizer, training rows, calibration tokens.

Whatever is wrong with it ends here, as one line (``BadInput``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from harness.config import needs_calibration
from harness.construct import build_method
from harness.data import check_token_ids, random_data
from harness.errors import BadInput, one_line
from harness.evaluate import check_tasks
from harness.fit import check_fit, check_memory, reason
from harness.identity import digest, local_path
from harness.method import Method
from harness.shared import shared_calibration, shared_rows
from harness.simulate import check_simulated
from harness.store import cache_directory
from harness.weights import check_files, load_weights

__all__ = ["Inputs", "check_inputs", "model_source", "read_inputs"]

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
CACHES = ("devices", "pruned", "scores", "tokens")


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, besides the weights.

    Attributes:
        shape: The config of the model.
        tokenizer: None outside of mode=run, without text.
        rows: Training rows: ``input_ids`` and ``labels``.
        calibration: Token ids ``[samples, length]`` for the pruner; None if it looks at no data.
    """

    shape: PretrainedConfig
    tokenizer: Tokenizer | None
    rows: Sequence[dict[str, list[int]]]
    calibration: Tensor | None


def read_inputs(cfg: DictConfig, method: Method) -> Inputs:
    """Read and check the inputs of a resolved config.

    Raises:
        BadInput: Anything that is missing, empty, malformed, or does not fit the shape of the model or the memory.
    """
    shape = _read_shape(cfg)
    check_fit(cfg, method, shape)
    train = cfg.train
    if cfg.mode == "simulate":
        check_simulated(method)
        return Inputs(shape, None, [], None)
    if cfg.mode == "profile":
        check_memory(cfg, method, shape, train.steps * train.batch_size * train.gradient_accumulation)
        rows = random_data(shape.get_text_config().vocab_size, train, cfg.seed)
        return Inputs(shape, None, rows, None)
    _check_caches(cfg)
    tokenizer = _read_tokenizer(cfg, shape)
    _check_weights(cfg)
    vocabulary = shape.get_text_config().vocab_size
    try:
        check_tasks(cfg.eval, tokenizer, vocabulary)
        rows = shared_rows(cfg, tokenizer)
        check_token_ids((max(row["input_ids"]) for row in rows), tokenizer, vocabulary, "the training rows")
        check_memory(cfg, method, shape, len(rows))
        calibration = None
        if needs_calibration(cfg.prune.name):
            calibration = shared_calibration(cfg, tokenizer)
            check_token_ids((int(sample.max()) for sample in calibration), tokenizer, vocabulary, "prune.text")
    except (ValueError, OSError) as error:
        raise BadInput(one_line(error)) from error
    return Inputs(shape, tokenizer, rows, calibration)


def check_inputs(jobs: Iterable[tuple[Sequence[str], DictConfig]]) -> None:
    """Read and check the inputs of the jobs of a sweep; what several of them share is read once.

    A simulation reads none and is not looked at.

    Args:
        jobs: The overrides and the resolved config of each.

    Raises:
        BadInput: As `read_inputs`; the message names the job.
    """
    disable_progress_bar()
    rows: dict[str, int] = {}
    fitting: set[str] = set()
    for overrides, cfg in jobs:
        config = OmegaConf.to_container(cfg)
        train = {name: config["train"][name] for name in ("sequence_length", "steps", "batch_size", "precision")}
        read = digest([{name: config[name] for name in ("mode", "model", "data", "prune", "eval")}, train])
        fit = digest([read, config["method"], config["adapter"], config["pattern"]])
        if cfg.mode == "simulate" or fit in fitting:
            continue
        try:
            method = build_method(cfg)
            if read in rows:
                shape = _read_shape(cfg)
                check_fit(cfg, method, shape)
                check_memory(cfg, method, shape, rows[read])
            else:
                rows[read] = len(read_inputs(cfg, method).rows)
        except BadInput as error:
            raise BadInput(f"{error} (in the job {' '.join(overrides)})") from error
        fitting.add(fit)


def model_source(cfg: DictConfig) -> tuple[str, str | None]:
    """Folder or Hub name of the model, and its revision on the Hub.

    Raises:
        BadInput: ``model.path`` can only be a folder, and there is none; or a revision of one.
    """
    path, revision = cfg.model.path, cfg.model.revision
    folder = local_path(path)
    if folder is not None:
        if not folder.is_dir():
            raise BadInput(f"model.path={path}: is a file; must be a model folder or a name on the Hub")
        if revision is not None:
            raise BadInput(f"model.revision={revision}: must be null for a folder; only the Hub has revisions")
        return str(folder), None
    if path == "microworld" or path.startswith(("/", "./", "../", "~")):
        raise BadInput(f"model.path={path}: no such folder; must be a model folder or a name on the Hub")
    return path, revision


def _check_caches(cfg: DictConfig) -> None:
    for folder in (cache_directory(cfg) / name for name in CACHES):
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"cache_root: {folder} must be a folder; it is a file")


def _read_shape(cfg: DictConfig) -> PretrainedConfig:
    """``model.shape`` outside of mode=run if the model has one, else ``config.json`` of ``model.path``."""
    if cfg.mode != "run" and cfg.model.shape is not None:
        try:
            shape = AutoConfig.for_model(**OmegaConf.to_container(cfg.model.shape))
        except Exception as error:  # what a config class raises at such a value is up to it
            raise BadInput(f"model.shape: describes no model ({reason(error)})") from error
    else:
        shape = _from_pretrained(AutoConfig, cfg, "config.json")
    if getattr(shape, "quantization_config", None) is not None:
        raise BadInput(f"model.path={cfg.model.path}: must not be quantized; its config.json has a quantization_config")
    if cfg.model.layers is not None:
        _cut(shape, cfg.model.layers)
    return shape


def _read_tokenizer(cfg: DictConfig, shape: PretrainedConfig) -> Tokenizer:
    """The tokenizer; without a padding token that the model knows end-of-text pads (the loss ignores it there)."""
    folder = local_path(cfg.model.path)
    if folder is not None:
        # By name, because transformers makes up an empty tokenizer for some architectures.
        if not any((folder / name).exists() for name in TOKENIZERS):
            raise BadInput(f"model.path={cfg.model.path}: the folder has no tokenizer ({', '.join(TOKENIZERS)})")
        if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            raise BadInput(f"model.path={cfg.model.path}: the folder has no weights ({', '.join(WEIGHTS)})")
    tokenizer = _from_pretrained(AutoTokenizer, cfg, "tokenizer")
    try:
        tokenizer("a text", add_special_tokens=False)
    except Exception as error:  # of any of three libraries
        raise BadInput(f"model.path={cfg.model.path}: its tokenizer cannot encode a text ({reason(error)})") from error
    padding = tokenizer.pad_token_id
    if padding is None or padding >= shape.get_text_config().vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_weights(cfg: DictConfig) -> None:
    """Names and shapes of the weights, against config.json; nothing is loaded."""
    path, revision = model_source(cfg)
    if os.path.exists(os.path.join(path, "adapter_config.json")):  # transformers would load what it points to
        raise BadInput(f"model.path={cfg.model.path}: must be a whole model; adapter_config.json says it is an adapter")
    shown = f"model.path={cfg.model.path}"
    disable_progress_bar()
    try:
        model = load_weights(path, revision, shown=shown, device_map="meta")
        check_files(Path(path), model, shown)
    except BadInput:
        raise
    except Exception as error:  # each file format has errors of its own
        raise BadInput(f"{shown}: its weights cannot be read ({reason(error)})") from error
    finally:
        enable_progress_bar()


def _from_pretrained(kind: type, cfg: DictConfig, wanted: str) -> Any:
    path, revision = model_source(cfg)
    try:
        return kind.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # what a damaged file raises is up to its format
        place = "the folder has" if os.path.isdir(path) else "no such folder, and the Hub gave"
        raise BadInput(f"model.path={cfg.model.path}: {place} no usable {wanted} ({reason(error)})") from error


def _cut(shape: PretrainedConfig, layers: int) -> None:
    """Keep the first decoder layers, also in the lists with an entry per layer that some configs have."""
    text = shape.get_text_config()
    full = text.num_hidden_layers
    if layers > full:
        raise BadInput(f"model.layers={layers}: must be at most {full}, the layers of the model")
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == full:
            setattr(text, name, value[:layers])
