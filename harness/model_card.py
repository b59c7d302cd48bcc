"""Which model the adapter of a run belongs to, and the model cards of what a run leaves, in the format of Hugging Face.

A card repeats what ``result.json`` says, so that the folder alone says where it comes from and how it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from omegaconf import DictConfig, OmegaConf
from peft import PeftConfig

from harness.files import write_text
from harness.summary import scores, sections

__all__ = ["ADAPTER", "BASE", "MERGED", "Base", "base_of", "write_card"]

# The folders of a run that have a card.
ADAPTER, BASE, MERGED = "adapter", "base", "merged"
HERE = f"./{BASE}"
# Of a recipe, in this order; what is null is left out.
RECIPE = "steps epochs batch_size gradient_accumulation sequence_length learning_rate minimum_learning_rate "
RECIPE += "warmup_steps weight_decay max_grad_norm precision"
VERSIONS = {"peft": "PEFT", "transformers": "Transformers", "torch": "PyTorch", "lors": "lors"}

LOAD_ADAPTER = """```python
{imports}from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("adapter", dtype="{dtype}")
```"""
LOAD_QUANTIZED = """```python
{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM

base = lors.load_quantized(AutoModelForCausalLM.from_pretrained("base", dtype="{dtype}"), "base")
model = PeftModel.from_pretrained(base, "adapter")
```"""
LOAD_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


class Base(NamedTuple):
    """The model that an adapter belongs to.

    Attributes:
        path: What ``adapter_config.json`` names: ``./base``, a name on the Hub, or a folder of the user.
        revision: On the Hub.
        origin: Name on the Hub of the model that it was made from, if it has one.
    """

    path: str
    revision: str | None = None
    origin: str | None = None


def base_of(cfg: DictConfig, provenance: Mapping[str, Any] | None) -> Base:
    """Where the base of the adapter of a run of this provenance can be had; never a folder of a cache.

    What the run has pruned itself, or made at random, and what comes with the bench, is nowhere but in ``base/`` beside
    the adapter (``save_base``).
    """
    made = (provenance or {}).get("model.path", {"source": None})
    source = made["source"]
    of_user = source == "a folder"
    origin = None if of_user or source == "microworld" else source
    pruned = cfg.prune.name != "none" and OmegaConf.select(cfg, "prune.when") != "after"
    dequantised = "values" in made  # a snapshot whose numbers are not those of the Hub
    if cfg.save_base or pruned or dequantised or not (of_user or origin):
        return Base(HERE, origin=origin)
    if of_user:
        return Base(cfg.model.path)
    return Base(source, made.get("revision"), origin)


def write_card(
    folder: Path,
    kind: str,
    result: Mapping[str, Any],
    base: Base,
    *,
    dtype: str,
    peft: PeftConfig | None = None,
    state: str | None = None,
) -> None:
    """Write ``README.md`` into a folder.

    Args:
        folder: Where.
        kind: ``adapter``, ``base`` or ``merged``.
        result: The content of ``result.json`` as far as it is known.
        base: See `base_of`.
        dtype: Of the weights of the base, such as ``float32``.
        peft: Of an adapter: its config.
        state: Of a merged model: its end state.
    """
    tags = ["pruned", "sparse"] if _is_pruned(result, kind) else []
    tags += [result["pattern"]] if tags and result["pattern"] != "unstructured" else []
    tags += [] if kind == BASE or result["method"] == "none" else [result["method"]]
    tags += [f"base_model:adapter:{base.origin}"] if base.origin and kind == ADAPTER else []
    relation = "adapter" if kind == ADAPTER else "finetune"
    licence = ((result["provenance"] or {}).get("model.path") or {}).get("licence")
    data = ModelCardData(
        base_model=base.origin,
        base_model_relation=base.origin and relation,
        library_name="peft" if kind == ADAPTER else "transformers",
        license=licence and licence.lower(),
        pipeline_tag="text-generation",
        tags=tags,
    )
    if kind == ADAPTER:
        text = _adapter(result, base, dtype, peft)
    else:
        text = _base(result, dtype) if kind == BASE else _merged(result, dtype, state)
    parts = [
        text,
        _rows([["", ""], ["---", "---"], *_facts(result, kind, base)]),
        *([] if kind == BASE else ["## Measured", _measured(result)]),
        *_scores(result, kind),
        "### Framework versions",
        "\n".join(f"- {name} {result['environment'][key]}" for key, name in VERSIONS.items()),
    ]
    write_text(folder / "README.md", f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _adapter(result: Mapping[str, Any], base: Base, dtype: str, peft: PeftConfig) -> str:
    package = type(peft).__module__.partition(".")[0]
    own = package != "peft"
    lines = [f"# {result['method']} adapter of {_name(result, ADAPTER)}"]
    if own:  # as lors.sparse_config has it
        lines.append(f"`import {package}` before PEFT loads this adapter: the import registers its method.")
    quantized = getattr(peft, "quantized_base", None)
    imports = sorted({*([package] if own else []), *(["lors"] if quantized else [])})
    template = LOAD_QUANTIZED if quantized else LOAD_ADAPTER
    lines.append(template.format(imports="".join(f"import {name}\n" for name in imports), dtype=dtype))
    if package == "baselines":
        lines.append("`baselines` cannot be installed: run this in a checkout of the bench.")
    if base.path == HERE:
        written = result["artifacts"]["base"]
        there = "which lies beside this folder" if written else "which the run has not written (`save_base=true` does)"
        lines.append(
            f"Its base is `{HERE}`, {there}: run this in the folder that holds `{ADAPTER}` and `{BASE}`, or anywhere "
            f'`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("PATH/{BASE}"), "PATH/{ADAPTER}")`.'
        )
    elif base.origin is None:
        lines.append(f"Its base is the folder `{base.path}` of the machine that it was made on.")
    return "\n\n".join(lines)


def _base(result: Mapping[str, Any], dtype: str) -> str:
    text = f"The model that was fine-tuned, as it was before: the base of `{ADAPTER}`. A plain model in {dtype}."
    return "\n\n".join([f"# {_name(result, BASE)}", text, LOAD_MODEL.format(folder=BASE)])


def _merged(result: Mapping[str, Any], dtype: str, state: str) -> str:
    row = result if result["end_state"] == state else result["variants"].get(state, {})
    text = f"A plain model in {dtype}."
    if result["sparsity"]:
        zeros = row["zeros"]
        kept = "Every zero of the pruned model is zero" if zeros["lost"] == 0 else f"{zeros['lost']:,} zeros are lost"
        kept += ", put back after the merge" if state == "remasked" else ""
        text += f" {kept}; {zeros['after_merge']:.2%} of the weights in the linear layers of its decoder are zero."
    tuned = "" if result["method"] == "none" else f", fine-tuned by {result['method']}"
    return "\n\n".join([f"# {_name(result, MERGED)}{tuned}", text, LOAD_MODEL.format(folder=MERGED)])


def _is_pruned(result: Mapping[str, Any], kind: str) -> bool:
    """Whether a folder has, or belongs to, a model with zeros: a control is pruned after its fine-tuning only."""
    return bool(result["sparsity"]) and (kind == MERGED or result["config"]["prune"].get("when") != "after")


def _name(result: Mapping[str, Any], kind: str) -> str:
    if not _is_pruned(result, kind):
        return f"{result['model']}, not pruned"
    pattern = "" if result["pattern"] == "unstructured" else f" ({result['pattern']})"
    return f"{result['model']}, {100 * result['sparsity']:.4g} % zeros{pattern}"


def _facts(result: Mapping[str, Any], kind: str, base: Base) -> list[list[str]]:
    """Names and values: method, base, pruning, zeros, data, recipe, run."""
    config, sources = result["config"], result["provenance"] or {}
    prune, data, support = config["prune"], config["data"], result["support"]
    model = sources.get("model.path")
    if base.revision is not None:
        model = {**model, "revision": base.revision}
    facts = {"base": _source(model, result["model"])}
    if _is_pruned(result, kind):
        by = (result["zeros"] or {}).get("pruned_by")
        facts["pruner"] = "none: it came with its zeros" if prune["name"] == "none" else prune["name"]
        facts["pruner"] += f", the sparsity of each block by {prune['layerwise']}" if prune.get("layerwise") else ""
        facts["pruner"] += ", after the fine-tuning" if prune.get("when") == "after" else ""
        if by is not None:
            facts["pruner"] = f"{by}, during the fine-tuning"
        elif "samples" in prune:
            text = _source(sources.get("prune.text"), "text")
            facts["pruner"] += f", calibrated on {prune['samples']} x {prune['sequence_length']} tokens of {text}"
        facts["zeros"] = f"sparsity {result['sparsity']:g}, pattern {result['pattern']}"
        if support is not None:
            facts["fingerprint of the zeros"] = f"sha256 {support['sha256']} (`lors.support.support_of`)"
    if kind != BASE and result["method"] != "none":
        method = {name: value for name, value in (config["method"].get("peft") or {}).items() if name != "_target_"}
        train = {name: config["train"].get(name) for name in RECIPE.split()}
        text = _source(sources.get("data.path"), data["name"] if result["mode"] == "run" else "random tokens")
        limit = "" if data["limit"] is None else f", the first {data['limit']:,} rows"
        facts |= {
            "method": f"{result['method']} ({_listed(method)})" if method else result["method"],
            "training data": f"{text}{limit}; loss on {data['loss_on']}",
            "recipe": _listed({**train, "seed": result["seed"]}),
        }
    facts["run"] = f"{result['key']}, commit {result['environment']['git_commit'] or 'unknown'}"
    return [[name, " ".join(str(value).split()).replace("|", "\\|")] for name, value in facts.items()]


def _source(made: Mapping[str, Any] | None, name: str) -> str:
    if made is None:
        return name
    text = name if made["source"] == "a folder" else made["source"]
    text += f", revision {made['revision']}" if made.get("revision") else ""
    text += f", {made['sha256']}" if made.get("sha256") else ""
    text += f", {made['values']}" if made.get("values") else ""
    return text + (f", licence {made['licence']}" if made.get("licence") else "")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _measured(result: Mapping[str, Any]) -> str:
    measured = {name: lines for name, lines in sections(result).items() if lines and name != "phases"}
    return "\n".join(f"- {name}: {'; '.join(lines)}" for name, lines in measured.items())


def _scores(result: Mapping[str, Any], kind: str) -> list[str]:
    """The table that the run prints, with a heading; of the base the models before the fine-tuning only."""
    table = scores(result)
    if kind == BASE:
        table = table[[name for name in table if name in ("dense", "pruned", "as pruned")]]
    if table.empty:
        return []
    rows = [[task, *cells] for task, cells in zip(table.index, table.to_numpy().tolist(), strict=True)]
    return ["## Scores", _rows([["in per cent", *table], ["---", *["---:"] * len(table.columns)], *rows])]


def _rows(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
