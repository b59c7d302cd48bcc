"""The packed form of an experiment: one Parquet file, a row per run.

    experiment                  the sweep that the run was made for; if it is not that of the file, the row is a copy,
                                so that the tables of the file are complete
    key, status                 of the run; status is ok, oom or failed
    mode .. end_state           the axes, as in ``result.json``
    commit, dirty               of the code that ran; dirty: with changes that were not committed
    accuracy_percent ..         the main numbers, null where there is none: mean accuracy over the tasks, perplexity on
    step_ms                     the held-out text, zeros lost, trainable parameters, peak of a training step in bytes,
                                median step time. They repeat ``result`` for readers
    config, environment         JSON: the resolved config, and the versions and the machine
    result                      JSON: the other fields of ``result.json``, without the scores of single items
    items                       JSON: the scores of single items, by model ("eval" is the headline end state)
    steps                       the training: a struct per step; null for a run without training

Folders of the machine that made a run are left out.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.files import atomically

__all__ = ["SUFFIX", "read_rows", "results_of", "write_rows"]

SUFFIX = ".parquet"
TEXT, NUMBER, COUNT = pa.string(), pa.float64(), pa.int64()
AXES = {
    **dict.fromkeys(("key", "status", "mode", "method", "model", "pruner", "pattern"), TEXT),
    **{"sparsity": NUMBER, "seed": COUNT, "end_state": TEXT},
}
REPEATED = {
    **{"commit": TEXT, "dirty": pa.bool_(), "accuracy_percent": NUMBER, "perplexity": NUMBER, "zeros_lost": COUNT},
    **{"trainable_parameters": COUNT, "train_peak_bytes": COUNT, "step_ms": NUMBER},
}
OBJECTS = ("config", "environment", "result", "items")
STEP = {
    **{"step": COUNT, "loss": NUMBER, "lr": NUMBER, "grad_norm": NUMBER, "ms": NUMBER, "forward_ms": NUMBER},
    **{"backward_ms": NUMBER, "optimizer_ms": NUMBER, "tokens": COUNT, "warmup": pa.bool_()},
}
STEPS = pa.list_(pa.struct(list(STEP.items())))
SCHEMA = pa.schema({"experiment": TEXT, **AXES, **REPEATED, **dict.fromkeys(OBJECTS, TEXT), "steps": STEPS})
# Config keys that name a folder of the machine; they are on the command line too.
PLACES = ("runs_root", "cache_root", "data_root")
# Of a task, of a text and of held-out answers: the scores of single items.
ITEMS = ("correct", "margins", "losses", "targets")

Row = dict[str, Any]


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Pack runs into a file, atomically.

    Args:
        file: The file.
        rows: Each the content of a ``result.json`` with one more field, `steps`: a list of steps, or None.

    Raises:
        ValueError: A field of a row or step has another type than its column.
    """
    try:
        table = pa.Table.from_pylist([_packed(row) for row in rows], schema=SCHEMA)
    except pa.ArrowException as error:
        raise ValueError(f"{file}: cannot be written, {' '.join(str(error).split())}") from error
    with atomically(file, "wb") as stream:
        pq.write_table(table, stream, compression="zstd", compression_level=19, write_page_checksum=True)


def read_rows(file: Path) -> list[Row]:
    """The runs of a file, as `write_rows` takes them, without `artifacts` and folders of the machine.

    Raises:
        ValueError: The file is damaged, or not packed by this module.
    """
    return _rows(file, SCHEMA.names)


def results_of(file: Path) -> list[Row]:
    """The runs of a file without their steps; raises as `read_rows`."""
    return _rows(file, [name for name in SCHEMA.names if name != "steps"])


def _rows(file: Path, columns: list[str]) -> list[Row]:
    try:
        return [_unpacked(row) for row in _table(file, columns).to_pylist()]
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: damaged ({type(error).__name__} in a JSON column)") from error


def _table(file: Path, columns: list[str]) -> pa.Table:
    try:
        # Opened here: pyarrow would take a file of this name for a folder of several if it could not be read.
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            if not opened.schema_arrow.equals(SCHEMA):
                raise ValueError(f"{file}: its columns are not those of packed runs")
            return opened.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: damaged, or no Parquet file ({' '.join(str(error).split())})") from error


def _packed(row: Row) -> Row:
    """The columns of a run."""
    row = json.loads(json.dumps(row))  # a copy, of which parts are moved
    config, environment = row.pop("config"), row.pop("environment")
    for place in PLACES:
        config.pop(place, None)
    if environment.get("command"):
        program, *words = environment["command"]
        words = [word for word in words if word.partition("=")[0] not in PLACES]
        environment["command"] = [Path(program).name, *words]
    row.pop("artifacts", None)
    columns = {"experiment": config["name"], "steps": row.pop("steps"), **_repeated(row, environment)}
    columns |= {name: row.pop(name) for name in AXES}
    items = {model: {name: _taken(part) for name, part in _parts(scores)} for model, scores in _scores(row)}
    objects = {"config": config, "environment": environment, "result": row, "items": items}
    return columns | {name: json.dumps(value) for name, value in objects.items()}


def _unpacked(columns: Row) -> Row:
    """The run of some columns."""
    config, environment, result, items = (json.loads(columns[name]) for name in OBJECTS)
    for model, scores in _scores(result):
        for name, part in _parts(scores):
            part |= items[model][name]
    steps = {"steps": columns["steps"]} if "steps" in columns else {}
    return {**{name: columns[name] for name in AXES}, **result, "config": config, "environment": environment, **steps}


def _repeated(row: Row, environment: Row) -> Row:
    scores = row["eval"] or {}
    accuracy = (scores.get("average") or {}).get("value")
    return {
        "commit": environment["git_commit"],
        "dirty": environment["git_dirty"],
        "accuracy_percent": None if accuracy is None else 100 * accuracy,
        "perplexity": (scores.get("perplexity") or {}).get("value"),
        "zeros_lost": (row["zeros"] or {}).get("lost"),
        "trainable_parameters": (row["parameters"] or {}).get("trainable"),
        "train_peak_bytes": row["memory"]["train_peak"],
        "step_ms": (row["time"]["step_ms"] or {}).get("p50"),
    }


def _scores(row: Row) -> Iterator[tuple[str, Row]]:
    """The scores of each model that a run has scored."""
    models = {"eval": row["eval"]}
    models |= {f"baselines.{name}": scores for name, scores in row["baselines"].items()}
    models |= {f"variants.{name}": variant["eval"] for name, variant in row["variants"].items()}
    return ((model, scores) for model, scores in models.items() if scores)


def _parts(scores: Row) -> Iterator[tuple[str, Row]]:
    """What may have scores of single items: the tasks, the text, and the held-out answers."""
    yield from scores["tasks"].items()
    yield from ((name, scores[name]) for name in ("perplexity", "held_out") if scores.get(name))


def _taken(part: Row) -> Row:
    return {name: part.pop(name) for name in ITEMS if name in part}
