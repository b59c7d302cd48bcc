"""The command ``lors``: prune a model, merge an adapter, look at the zeros of a model.

    lors prune MODEL OUT --sparsity 0.5 --calibration texts.jsonl
    lors prune MODEL OUT --pattern 2:4                                    # with C4, from the Hub
    lors merge ADAPTER OUT
    lors check FOLDER

MODEL and ADAPTER are folders or names on the Hub; OUT is a new folder of transformers, with the tokenizer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lors.pruning import PRUNERS, calibration_tokens, prune_model
from lors.pruning.calibration import LENGTH, positions_of
from lors.pruning.layerwise import LAYERWISE
from lors.sparsity import UNSTRUCTURED, check, resolve_sparsity, supports, zero_report

__all__ = ["main"]

C4 = "c4"
# The file of C4 that the code of Wanda and of SparseGPT reads.
C4_FILE = {"repo_id": "allenai/c4", "filename": "en/c4-train.00000-of-01024.json.gz", "repo_type": "dataset"}
POOL = 10_000  # documents that samples are drawn from, the first ones


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, or 1 with one line that says what is wrong."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"lors {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lors", description="Prune language models, and fine-tune them so.")
    commands = parser.add_subparsers(dest="command", required=True)

    prune = commands.add_parser("prune", help="prune a model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    prune.add_argument("model", help="folder or name on the Hub")
    prune.add_argument("out", type=Path, help="new folder")
    prune.add_argument("--pruner", choices=PRUNERS, default="wanda", help="how the weights are chosen")
    prune.add_argument(
        "--sparsity", type=float, help="fraction of the weights that become zero; of the pattern if left out"
    )
    prune.add_argument("--pattern", default=UNSTRUCTURED, help="unstructured, or n:m (n weights kept of every m)")
    prune.add_argument(
        "--layerwise",
        choices=LAYERWISE,
        default="none",
        help="a sparsity of each block: owl, less for more outliers; rmi, more for an input like those of the others",
    )
    prune.add_argument(
        "--calibration", default=C4, help="text file, JSON lines with a column 'text', or c4 from the Hub"
    )
    prune.add_argument("--samples", type=int, default=128, help="calibration samples")
    prune.add_argument("--length", type=int, help="tokens of a sample; 2048, or as many as the model has positions")
    prune.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    prune.add_argument("--device", help="where blocks are pruned, one at a time, such as cuda")
    prune.set_defaults(run=_prune)

    merge = commands.add_parser("merge", help="merge an adapter into its base, whose zeros must stay")
    merge.add_argument("adapter", help="folder or name on the Hub")
    merge.add_argument("out", type=Path, help="new folder")
    merge.set_defaults(run=_merge)

    look = commands.add_parser("check", help="sparsity of a model and of its layers, pattern, fingerprint of the zeros")
    look.add_argument("model", help="folder or name on the Hub")
    look.set_defaults(run=_check)
    return parser


def _prune(options: argparse.Namespace) -> None:
    _check_new(options.out)
    resolve_sparsity(options.sparsity, options.pattern)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    tokens = None
    if PRUNERS[options.pruner][1] is not None or options.layerwise != "none":
        documents = [*islice(_documents(options.calibration), POOL)]
        positions = positions_of(AutoConfig.from_pretrained(options.model, trust_remote_code=False))
        if options.length is not None and options.length > positions:
            raise ValueError(f"--length {options.length}: must be at most {positions}, the positions of the model")
        length = options.length or min(LENGTH, positions)
        size = {"samples": options.samples, "length": length, "seed": options.seed}
        tokens = calibration_tokens(documents, tokenizer, **size)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", trust_remote_code=False)
    how = {"sparsity": options.sparsity, "pattern": options.pattern, "device": options.device}
    how["layerwise"] = options.layerwise
    prune_model(model, options.pruner, calibration=tokens, **how)
    _save(model, options.out, options.model)
    _print_zeros(model)


def _merge(options: argparse.Namespace) -> None:
    _check_new(options.out)
    model = AutoPeftModelForCausalLM.from_pretrained(options.adapter, dtype="auto", trust_remote_code=False)
    base = next(iter(model.peft_config.values())).base_model_name_or_path
    before, pattern = supports(model), check(model)["pattern"]
    merged = model.merge_and_unload(safe_merge=True)
    lost = zero_report(before, merged, pattern)["lost"]
    if lost:
        raise ValueError(f"{options.adapter}: its merge fills {lost} zeros of {base}; nothing is written")
    own = (Path(options.adapter) / "tokenizer_config.json").is_file()
    _save(merged, options.out, options.adapter if own else base)
    _print_zeros(merged)


def _check(options: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", trust_remote_code=False)
    for name, sparsity in _print_zeros(model).items():
        print(f"{name:50} {sparsity:.6f}")


def _print_zeros(model: PreTrainedModel) -> dict[str, float]:
    found = check(model)
    print(f"sparsity {found['sparsity']:.6f}, pattern {found['pattern']}, sha256 of the zeros {found['sha256']}")
    return found["layers"]


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder}: must be a new folder, and is there")


def _save(model: PreTrainedModel, folder: Path, source: str) -> None:
    """Write a whole folder or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        written = Path(place) / folder.name
        model.save_pretrained(written)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(written)
        written.rename(folder)


def _documents(source: str) -> Iterator[str]:
    """The texts of a file: of JSON lines the column ``text``, of any other file the whole."""
    if source == C4:
        source = hf_hub_download(**C4_FILE)
    opened = gzip.open if source.endswith(".gz") else open
    with opened(source, "rt", encoding="utf-8") as stream:
        if not source.removesuffix(".gz").endswith((".json", ".jsonl")):
            yield stream.read()
            return
        for number, line in enumerate(stream, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, LookupError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f"{source}:{number}: must be a JSON object with a text in 'text'")
            yield text


if __name__ == "__main__":
    sys.exit(main())
