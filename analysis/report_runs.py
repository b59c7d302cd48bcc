"""What the report knows of every run: identity, links to its files, and the details that a click shows."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from analysis.groups import flat
from analysis.notes import pruning_of
from analysis.results import read
from analysis.steps import losses_of
from analysis.style import END_STATES, name_of

__all__ = ["Run", "Runs", "gather"]

MEBIBYTE = 2**20
# Files of a run folder, with the words of their links.
FILES = {"config.yaml": "config", "log.txt": "log", "result.json": "result and environment", "steps.jsonl": "steps"}
# Points of a loss curve: more cannot be seen at the size of the drawing.
POINTS = 80
# Of the config: what only says where things are.
PLACES = ("runs_root", "cache_root", "force", "launch", "name")
CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "transients", "other")


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
        id: Of its row in the page.
        content: The result.
        files: (words, relative link) of the files that exist.
        loss: (step, loss) of the training, thinned.
    """

    id: str
    content: Mapping[str, Any]
    files: list[tuple[str, str]]
    loss: list[tuple[int, float]]

    @property
    def method(self) -> str:
        """The method; of a run without training the model that it scored, as in the tables."""
        if self.content["method"] != "none":
            return self.content["method"]
        return "pruned" if self.content["sparsity"] else "dense"

    @property
    def title(self) -> str:
        """Method, model, pruning and seed."""
        content = self.content
        parts = [name_of(self.method), content["model"], pruning(content), f"seed {content['seed']}"]
        return " · ".join(parts if content["mode"] == "run" else [*parts, content["mode"]])

    @property
    def tab(self) -> str:
        """What tells it from the other runs behind one cell."""
        content = self.content
        return f"{name_of(self.method)}, seed {content['seed']}, {content['key'][:6]}"


@dataclass(frozen=True)
class Runs:
    """All runs of a page.

    Attributes:
        by_path: Run by the path of its result file.
        shared: (title, facts): config and environment values that all runs have in common.
    """

    by_path: Mapping[str, Run]
    shared: list[tuple[str, list[tuple[str, str]]]]

    def ids(self, paths: Iterable[str]) -> list[str]:
        """Ids of runs by their paths."""
        return list(dict.fromkeys(self.by_path[path].id for path in paths))

    def ids_of_keys(self, keys: Iterable[str]) -> list[str]:
        """Ids of runs by their keys."""
        wanted = set(keys)
        return [run.id for run in self.by_path.values() if run.content["key"] in wanted]

    def payload(self) -> dict[str, Any]:
        """What the script of the page reads."""
        common = {name for _, facts in self.shared for name, _ in facts}
        return {"shared": self.shared, "runs": {run.id: _details(run, common) for run in self.by_path.values()}}


def gather(table: pd.DataFrame, output: Path) -> Runs:
    """Read the runs of a table of results.

    Args:
        table: As `analysis.results.load` returns it.
        output: Folder of the page; links are relative to it.
    """
    runs: dict[str, Run] = {}
    taken: set[str] = set()
    for path in dict.fromkeys(table.path):
        content = read(path)
        name = f"run-{content['key']}"
        # One key may have been run on several machines.
        name = next(free for n in range(1, len(taken) + 2) if (free := name if n == 1 else f"{name}-{n}") not in taken)
        taken.add(name)
        files = [(words, _link(path.with_name(file), output)) for file, words in FILES.items()
                 if path.with_name(file).exists()]  # fmt: skip
        runs[str(path)] = Run(name, content, files, _loss(path.with_name("steps.jsonl")))
    return Runs(runs, _shared(list(runs.values())))


def pruning(content: Mapping[str, Any]) -> str:
    """How the model of a run was pruned, in words."""
    label = content["pattern"] if content["pattern"] != "unstructured" else f"{content['sparsity']:.4g}"
    return pruning_of({**content, "label": label})


def _link(file: Path, output: Path) -> str:
    return quote(Path(os.path.relpath(file.resolve(), output.resolve())).as_posix())


def _loss(file: Path) -> list[tuple[int, float]]:
    points = [(step, loss) for step, loss in losses_of(file) if not math.isnan(loss)]
    every = max(1, math.ceil(len(points) / POINTS))
    thinned = points[::every]
    thinned += points[-1:] if points and thinned[-1] != points[-1] else []
    return [(step, float(f"{loss:.4g}")) for step, loss in thinned]


def _settings(run: Run) -> dict[str, str]:
    config = {key: value for key, value in flat(run.content["config"]).items() if key.split(".")[0] not in PLACES}
    return {key: _text(value) for key, value in config.items()}


def _environment(run: Run) -> dict[str, str]:
    return {key: _text(value) for key, value in run.content["environment"].items() if key != "command"}


def _shared(runs: list[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    sections = (("Settings", [_settings(run) for run in runs]), ("Environment", [_environment(run) for run in runs]))
    return [
        (title, [(k, v) for k, v in of_all[0].items() if len(of_all) > 1 and all(one.get(k) == v for one in of_all)])
        for title, of_all in sections
    ]


def _details(run: Run, common: set[str]) -> dict[str, Any]:
    content = run.content
    facts = [
        ("Settings", [(key, text) for key, text in _settings(run).items() if key not in common]),
        ("Result", _result_facts(content)),
        ("Time", _time_facts(content["time"], content["flops"])),
        ("Environment", [(key, text) for key, text in _environment(run).items() if key not in common]),
    ]
    error = content["error"]
    command = content["environment"].get("command")
    return {
        "key": content["key"],
        "title": run.title,
        "tab": run.tab,
        "status": content["status"],
        "error": None if error is None else f"{error['type']}: {error['message']}",
        "files": run.files,
        "scores": _scores(content),
        "memory": _memory(content["memory"]),
        "loss": run.loss,
        "facts": facts,
        "command": None if not command else f"python {' '.join(command)}",
    }


def _scores(content: Mapping[str, Any]) -> list[list[str]]:
    """One column for each model: dense, pruned, and every end state."""
    states = {content["end_state"]: content["eval"]} | {k: v["eval"] for k, v in content["variants"].items()}
    models = dict(content["baselines"])
    for state, scores in states.items():
        if content["method"] != "none":
            models[END_STATES.get(state, "fine-tuned")] = scores
    models = {name: scores for name, scores in models.items() if scores}
    tasks = dict.fromkeys(task for scores in models.values() for task in scores["tasks"])
    rows = [["", *models]]
    for task in tasks:
        cells = [scores["tasks"].get(task) for scores in models.values()]
        metric = next(cell["metric"] for cell in cells if cell)
        rows.append([f"{task.removeprefix('microworld_')} ({metric})", *map(_percent, cells)])
    if any(scores["average"] for scores in models.values()):
        rows.append(["average", *(_percent(scores["average"]) for scores in models.values())])
    if any(scores["perplexity"] for scores in models.values()):
        values = [(scores["perplexity"] or {}).get("value") for scores in models.values()]
        rows.append(["perplexity", *("-" if value is None else f"{value:.2f}" for value in values)])
    return rows


def _percent(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    error = "" if score.get("stderr") is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.1f}{error}"


def _memory(memory: Mapping[str, Any]) -> list[tuple[str, float, str]] | None:
    """(category, share, size) of what lives at the peak of a training step."""
    parts, peak = memory.get("breakdown"), memory.get("train_peak")
    if not parts or not peak:
        return None
    return [(name, parts[name] / peak, f"{parts[name] / MEBIBYTE:,.1f} MiB") for name in CATEGORIES if name in parts]


def _result_facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    zeros, size, memory = content["zeros"] or {}, content["parameters"] or {}, content["memory"]
    after, lost = zeros.get("after_merge"), zeros.get("lost")
    facts = [
        ("zeros after pruning", _share(zeros.get("after_prune"))),
        ("zeros after the merge", _share(after)),
        ("zeros lost", None if lost is None else f"{lost:,}"),
        ("trainable", None if not size.get("trainable") else f"{size['trainable']:,} of {size['total']:,}"),
        ("peak of a training step", _mebibytes(memory.get("train_peak"))),
        ("peak of the evaluation", _mebibytes(memory.get("eval_peak"))),
        ("peak of the process", _mebibytes(memory.get("process_rss_peak"))),
    ]
    return [(name, text) for name, text in facts if text is not None]


def _time_facts(time: Mapping[str, Any], flops: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    if time["step_ms"]:
        step = time["step_ms"]
        facts.append(("step", f"{step['p50']:.1f} ms (p10 {step['p10']:.1f}, p90 {step['p90']:.1f})"))
        for part in ("forward", "backward", "optimizer"):
            if time[f"{part}_ms"] is not None:
                facts.append((part, f"{time[f'{part}_ms']:.1f} ms"))
        facts.append(("timed", f"{time['steps']} steps, {time['warmup_steps']} warm-up steps dropped"))
        facts.append(("tokens per second", f"{time['tokens_per_second']:,.0f}"))
    if flops["per_step"]:
        facts.append(("FLOP per step", f"{flops['per_step'] / 1e9:,.1f} G"))
    return facts + [(f"phase {name}", f"{seconds:.1f} s") for name, seconds in time["phases"].items()]


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.2f} %"


def _mebibytes(size: float | None) -> str | None:
    return None if size is None else f"{size / MEBIBYTE:,.1f} MiB"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
