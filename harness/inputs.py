"""Everything that a run reads before a model is loaded: shape, tokenizer, training rows, calibration tokens.

Whatever is wrong with it ends here, as one line (``BadInput``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from harness.config_schema import needs_calibration
from harness.data import (
    Batch,
    Collator,
    Row,
    batches_of,
    calibration_samples,
    held_out_rows,
    random_data,
    training_rows,
)
from harness.errors import BadInput, one_line
from harness.evaluate import check_tasks
from harness.feasible import check_fit, check_memory, reason
from harness.hub import NO_REVISION, UNREACHABLE, fault, files_of, quiet
from harness.identity import digest, local_path, with_fingerprints
from harness.method import Method
from harness.method_from_config import build_method
from harness.shards import can_shard
from harness.sources import REMEDY
from harness.weights import check_files, load_weights

__all__ = ["Inputs", "Source", "check_inputs", "read_inputs"]

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What `cached_file` is to say of a file that cannot be had: nothing.
LENIENT = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
CACHES = ("devices", "pruned", "scores", "tokens")


class Source(NamedTuple):
    """Where the model is.

    Attributes:
        path: A folder, or a name on the Hub.
        revision: On the Hub.
        shown: What a message says of it.
        folder: The folder; None on the Hub.
        options: Of ``from_pretrained``, that ``model`` sets.
    """

    path: str
    revision: str | None
    shown: str
    folder: Path | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, besides the weights.

    Attributes:
        shape: The config of the model.
        fingerprinted: The config with fingerprints in place of paths, see `identity.with_fingerprints`.
        source: Where the model is.
        tokenizer: None outside of mode=run, without text.
        rows: Training rows: ``input_ids`` and ``labels``.
        pad: Makes batches of rows, as the training has them.
        longest: The first batch, padded to ``train.sequence_length``.
        calibration: Token ids ``[samples, length]`` for the pruner; None if it looks at no data.
        windows: Token ids ``[windows, length]`` of the text whose perplexity is measured; None without one.
        held_out: Rows whose answers' perplexity is measured.
    """

    shape: PretrainedConfig
    fingerprinted: dict[str, Any]
    source: Source
    tokenizer: Tokenizer | None = None
    rows: Sequence[Row] = ()
    pad: Collator | None = None
    longest: Batch | None = None
    calibration: Tensor | None = None
    windows: Tensor | None = None
    held_out: Sequence[Row] = ()


def read_inputs(cfg: DictConfig, method: Method) -> Inputs:
    """Read and check the inputs of a resolved config.

    Raises:
        BadInput: Anything that is missing, empty, malformed, or does not fit the shape of the model or the memory.
    """
    fingerprinted, folder = with_fingerprints(cfg), local_path(cfg.model.path)
    source = _source(cfg, folder)
    whole = f"for method={method.name}, whose steps need whole weights"
    if cfg.launch.shard and not can_shard(method):
        raise BadInput(f"launch.shard=true: must be false {whole}")
    if cfg.launch.processes > 1 and type(method).objective is not Method.objective:
        raise BadInput(
            f"launch.processes={cfg.launch.processes}: must be 1 for method={method.name}, with its own loss"
        )
    if cfg.mode == "simulate" and cfg.simulate.shards > 1 and not can_shard(method):
        raise BadInput(f"simulate.shards={cfg.simulate.shards}: must be 1 {whole}")
    shape = _read_shape(cfg, source)
    check_fit(cfg, method, shape)
    train = cfg.train
    if cfg.mode == "simulate":
        return Inputs(shape, fingerprinted, source)
    if cfg.mode == "profile":
        check_memory(cfg, method, shape, train.steps * train.batch_size * train.gradient_accumulation)
        rows = random_data(shape.get_text_config().vocab_size, train, cfg.seed)
        pad, longest = batches_of(rows, train, None)
        return Inputs(shape, fingerprinted, source, rows=rows, pad=pad, longest=longest)
    _check_caches(cfg)
    tokenizer = _read_tokenizer(source, shape, OmegaConf.select(cfg, "model.pad_token"))
    _check_weights(source)
    vocabulary = shape.get_text_config().vocab_size
    try:
        windows = check_tasks(cfg.eval, tokenizer, vocabulary)
        rows = training_rows(cfg, fingerprinted, tokenizer, vocabulary)
        held_out = held_out_rows(cfg, fingerprinted, tokenizer, vocabulary) if cfg.eval.held_out else ()
        calibrated = needs_calibration(cfg.prune.name)
        calibration = calibration_samples(cfg, fingerprinted, tokenizer, vocabulary) if calibrated else None
        check_memory(cfg, method, shape, len(rows))
        pad, longest = batches_of(rows, train, tokenizer)
    except (ValueError, OSError) as error:
        raise BadInput(one_line(error)) from error
    return Inputs(shape, fingerprinted, source, tokenizer, rows, pad, longest, calibration, windows, held_out)


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
                shape = _read_shape(cfg, _source(cfg, local_path(cfg.model.path)))
                check_fit(cfg, method, shape)
                check_memory(cfg, method, shape, rows[read])
            else:
                rows[read] = len(read_inputs(cfg, method).rows)
        except BadInput as error:
            raise BadInput(f"{error} (in the job {' '.join(overrides)})") from error
        fitting.add(fit)


def _source(cfg: DictConfig, folder: Path | None) -> Source:
    """Where ``model.path`` is: in a folder, or on the Hub.

    Raises:
        BadInput: It can only be a folder, and there is none; or a revision of one.
    """
    path, revision = cfg.model.path, cfg.model.revision
    shown = f"model.path={path}"
    model = OmegaConf.to_container(cfg.model)
    options = {name: model[name] for name in ("attn_implementation", "device_map") if model.get(name) is not None}
    if folder is not None:
        if not folder.is_dir():
            raise BadInput(f"{shown}: is a file; must be a model folder or a name on the Hub")
        if revision is not None:
            raise BadInput(f"model.revision={revision}: must be null for a folder; only the Hub has revisions")
        return Source(str(folder), None, shown, folder, options)
    return Source(path, revision, shown, None, options)


def _check_caches(cfg: DictConfig) -> None:
    for folder in (Path(cfg.cache_root, name) for name in CACHES):
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"cache_root: {folder} must be a folder; it is a file")


def _read_shape(cfg: DictConfig, source: Source) -> PretrainedConfig:
    """``model.shape`` outside of mode=run if the model has one, else ``config.json`` of ``model.path``."""
    layers = cfg.model.layers
    if cfg.mode != "run" and cfg.model.shape is not None:
        try:
            shape = AutoConfig.for_model(**OmegaConf.to_container(cfg.model.shape))
        except Exception as error:  # what a config class raises at such a value is up to it
            raise BadInput(f"model.shape: describes no model ({reason(error)})") from error
    else:
        shape = _from_pretrained(AutoConfig, source, "config.json")
    attention = source.options.get("attn_implementation")
    if attention is not None:
        shape._attn_implementation = attention
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
        except Exception as error:  # of a package that is missing, or a model that has none of this kind
            raise BadInput(f"model.attn_implementation={attention}: cannot be had here ({reason(error)})") from error
    if getattr(shape, "quantization_config", None) is not None:
        raise BadInput(f"{source.shown}: must not be quantized; its config.json has a quantization_config")
    if layers is None:
        return shape
    text = shape.get_text_config()
    full = text.num_hidden_layers
    if layers > full:
        raise BadInput(f"model.layers={layers}: must be at most {full}, the layers of the model")
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):  # some configs have lists with an entry per layer
        if isinstance(value, list) and len(value) == full:
            setattr(text, name, value[:layers])
    return shape


def _read_tokenizer(source: Source, shape: PretrainedConfig, pad_token: str | None) -> Tokenizer:
    """The tokenizer; without a padding token that the model knows end-of-text pads, else token 0 (no loss is on it)."""
    folder = source.folder
    if folder is not None:
        # By name, because transformers makes up an empty tokenizer for some architectures.
        if not any((folder / name).exists() for name in TOKENIZERS):
            raise BadInput(f"{source.shown}: the folder has no tokenizer ({', '.join(TOKENIZERS)})")
        if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            raise BadInput(f"{source.shown}: the folder has no weights ({', '.join(WEIGHTS)})")
    tokenizer = _from_pretrained(AutoTokenizer, source, "tokenizer")
    try:
        tokenizer("a text", add_special_tokens=False)
    except Exception as error:  # of any of three libraries
        raise BadInput(f"{source.shown}: its tokenizer cannot encode a text ({reason(error)})") from error
    vocabulary = shape.get_text_config().vocab_size
    if pad_token is not None:
        if tokenizer.get_vocab().get(pad_token, vocabulary) >= vocabulary:
            raise BadInput(f"model.pad_token={pad_token}: must be a token that tokenizer and model know")
        tokenizer.pad_token = pad_token
    padding = tokenizer.pad_token_id
    if padding is None or padding >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _check_weights(source: Source) -> None:
    """Names and shapes of the weights, against config.json; nothing is loaded."""
    path, shown = source.path, source.shown
    disable_progress_bar()
    try:
        if cached_file(path, "adapter_config.json", revision=source.revision, **LENIENT):
            # transformers would load what it points to
            raise BadInput(f"{shown}: must be a whole model; adapter_config.json says it is an adapter")
        model = load_weights(path, source.revision, shown=shown, device_map="meta")
        check_files(source.folder or files_of(path, source.revision), model, shown)
    except BadInput:
        raise
    except Exception as error:  # each file format has errors of its own
        raise _unusable(source, error, "weights") from error
    finally:
        enable_progress_bar()


def _from_pretrained(kind: type, source: Source, wanted: str) -> Any:
    path = source.path
    if path == "microworld" or (source.folder is None and path.startswith(("/", "./", "../", "~"))):
        raise BadInput(f"{source.shown}: no such folder; must be a model folder or a name on the Hub")
    quiet()
    try:
        return kind.from_pretrained(path, revision=source.revision, trust_remote_code=False)
    except Exception as error:  # what a damaged file raises is up to its format
        raise _unusable(source, error, wanted) from error


def _unusable(source: Source, error: Exception, wanted: str) -> BadInput:
    if source.folder is not None:
        found = "its weights cannot be read" if wanted == "weights" else f"the folder has no usable {wanted}"
        return BadInput(f"{source.shown}: {found} ({reason(error)})")
    words = fault(error)
    if words == NO_REVISION:
        return BadInput(f"model.revision={source.revision}: {source.path} on the Hub: {words}")
    remedy = f"; {REMEDY}" if words == UNREACHABLE else ""
    why = words or reason(error)
    return BadInput(f"{source.shown}: no such folder or snapshot, and the Hub gave no usable {wanted}: {why}{remedy}")
