"""Scores of a model: zero-shot accuracy through lm-evaluation-harness, and perplexity.

Three sources of tasks, all by their lm-eval names in ``eval.tasks``:

- ``microworld_boolq`` ... : seven tasks about the embedded world, spelled out in ``lors/microworld/tasks``;
- the seven of the papers (``ZERO_SHOT``): lm-eval's own, from the Hub, or from a file
  ``<eval.data_root>/<task>/<split>.jsonl``;
- any other task of lm-eval, from the Hub.

A task is scored by `acc` if it has it, else by its first metric; `acc_norm` is recorded beside. The average
is over `acc` alone, as in the papers; its standard error is sqrt(sum of squared errors) / number of tasks. Which items
were right is recorded too, so that models can be compared item by item.
Scores do not depend on random numbers, and the random state of the process is left alone.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lors import microworld
from lors.harness.corpora import read_rows
from lors.harness.perplexity import perplexity, perplexity_text
from lors.harness.randomness import random_state_kept
from lors.harness.validate import BadInput

__all__ = ["ZERO_SHOT", "check_tasks", "evaluate"]


@dataclass(frozen=True)
class StockTask:
    """What has to be known of one of lm-eval's own tasks.

    Attributes:
        split: The split that lm-eval scores.
        folder: Where lm-eval keeps the task; naming it spares an index of its ten thousand task files.
        columns: Columns that its prompt reads.
    """

    split: str
    folder: str
    columns: tuple[str, ...]


ARC_COLUMNS = ("question", "choices", "answerKey")
# The seven tasks of the papers.
ZERO_SHOT = {
    "boolq": StockTask("validation", "super_glue/boolq", ("question", "passage", "label")),
    "rte": StockTask("validation", "glue/rte", ("sentence1", "sentence2", "label")),
    "hellaswag": StockTask("validation", "hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": StockTask("validation", "winogrande", ("sentence", "option1", "option2", "answer")),
    "arc_easy": StockTask("test", "arc", ARC_COLUMNS),
    "arc_challenge": StockTask("test", "arc", ARC_COLUMNS),
    "openbookqa": StockTask("test", "openbookqa", ("question_stem", "choices", "answerKey")),
}
MICROWORLD_TASKS = {f"microworld_{task}": task for task in microworld.TASKS}
MICROWORLD_FOLDER = Path(microworld.__file__).parent / "tasks"
BOOTSTRAP = 1000  # draws for the standard error of a metric that is no mean; that of a mean is exact
FEWSHOT_SEED = 1234  # lm-eval's default; for tasks that bring examples, which none of the seven does


def check_tasks(eval_cfg: Any) -> None:
    """Find what is wrong with the tasks and the text of a config before a model is loaded.

    Args:
        eval_cfg: ``tasks``, ``data_root``, ``perplexity``.

    Raises:
        BadInput: An unknown task, a missing file, a malformed line or a missing column in ``data_root``, or
            no such text.
    """
    root = eval_cfg.data_root
    if root is not None and not Path(root).expanduser().is_dir():
        raise BadInput(f"eval.data_root={root}: no such folder")
    others = [task for task in eval_cfg.tasks if task not in MICROWORLD_TASKS and task not in ZERO_SHOT]
    if others:
        known = _task_manager(tuple(others)).task_index
        for task in others:
            if task not in known:
                near = ", ".join([*MICROWORLD_TASKS, *ZERO_SHOT])
                raise BadInput(f"eval.tasks: unknown task {task!r}; must be a task of lm-eval, or one of {near}")
    if root is not None:
        for task in eval_cfg.tasks:
            if task in ZERO_SHOT:
                _check_columns(_local_file(root, task), task)
    if eval_cfg.perplexity is not None and (root is not None or eval_cfg.perplexity.text != "wikitext"):
        perplexity_text(eval_cfg.perplexity.text, root)


def evaluate(model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any, progress: bool = True) -> dict[str, Any]:
    """Score a model on the tasks and the text of ``conf/eval``.

    Args:
        model: The model, on its device; in its former mode afterwards.
        tokenizer: The model's; not changed.
        eval_cfg: ``tasks``, ``data_root``, ``limit`` (first items of each task), ``batch_size`` (fixed: rows
            per forward pass), ``add_bos_token``, ``perplexity`` (``text``, ``window``; None for none),
            ``split`` (of the microworld's items: test or validation; test where nothing is said).
        progress: Show progress bars.

    Returns:
        ``tasks``: name -> {metric, value, stderr, n, version, and where the task has them acc_norm,
            acc_norm_stderr, and correct: a text of "1" (by `acc`) and "0", one for each item in the task's order};
        ``average``: {metric: acc, value, stderr, tasks (the averaged names)} or None without a task that has
            `acc`;
        ``perplexity``: see `perplexity.perplexity`, with ``text``; or None.

    Raises:
        BadInput: See `check_tasks`.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        tasks = _zero_shot(model, tokenizer, eval_cfg, progress) if eval_cfg.tasks else {}
        text = None
        if eval_cfg.perplexity is not None:
            options = {"window": eval_cfg.perplexity.window, "add_bos_token": eval_cfg.add_bos_token}
            boundary = f"{tokenizer.eos_token or ''}{tokenizer.bos_token or ''}" or "\n\n"
            source = perplexity_text(eval_cfg.perplexity.text, eval_cfg.data_root, boundary)
            measured = perplexity(model, tokenizer, source, **options, progress=progress)
            text = {"text": eval_cfg.perplexity.text, **measured}
    finally:
        for module, training in modes:
            module.training = training
    return {"tasks": tasks, "average": _average(tasks), "perplexity": text}


def _zero_shot(
    model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any, progress: bool
) -> dict[str, dict[str, Any]]:
    with _lean_lm_eval(), random_state_kept(), tempfile.TemporaryDirectory(prefix="lors-eval-") as folder:
        import lm_eval

        from lors.harness.scoring import PromptSharingLM

        loaded = _task_manager(tuple(eval_cfg.tasks)).load(_specifications(eval_cfg, Path(folder)))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        # A copy, because lm-eval gives a tokenizer without padding token one.
        lm = PromptSharingLM(
            model,
            copy.deepcopy(tokenizer),
            batch_size=eval_cfg.batch_size,
            add_bos_token=eval_cfg.add_bos_token,
            progress=progress,
        )
        scores = lm_eval.evaluate(lm, loaded, limit=eval_cfg.limit, bootstrap_iters=BOOTSTRAP, log_samples=True)
    return {name: _score(scores, name) for name in loaded["tasks"]}


def _specifications(eval_cfg: Any, folder: Path) -> list[Any]:
    """The tasks as lm-eval loads them: plain names, and one group of stock tasks whose data set is a local
    file.

    An override of a stock task works only inside a group's list. `folder` holds what has to be written.
    """
    local: list[dict[str, Any]] = []
    plain: list[str] = []
    for name in eval_cfg.tasks:
        if name in MICROWORLD_TASKS:
            file = folder / f"{name}.jsonl"
            rows = microworld.task_rows(MICROWORLD_TASKS[name], getattr(eval_cfg, "split", "test"))
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            local.append({"task": name, "dataset_kwargs": _json_files("test", file, folder)})
        elif name in ZERO_SHOT and eval_cfg.data_root is not None:
            # Every split that the task would look for has to be named, or be null.
            split = ZERO_SHOT[name].split
            splits = {"training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split}
            files = _json_files(split, _local_file(eval_cfg.data_root, name), folder)
            local.append(
                {"task": name, "dataset_path": "json", "dataset_name": None, **splits, "dataset_kwargs": files}
            )
        else:
            plain.append(name)
    return [*plain, {"group": "lors_local", "task": local}] if local else plain


def _json_files(split: str, file: Path, folder: Path) -> dict[str, Any]:
    # Absolute, because lm-eval resolves against the working directory; a cache of our own leaves none behind.
    return {"data_files": {split: str(file.resolve())}, "cache_dir": str(folder / "cache")}


def _local_file(root: str, task: str) -> Path:
    return Path(root).expanduser() / task / f"{ZERO_SHOT[task].split}.jsonl"


def _check_columns(file: Path, task: str) -> None:
    rows = list(read_rows(str(file), key="eval.data_root"))
    if not rows:
        raise BadInput(f"eval.data_root: {file} is empty")
    for number, row in enumerate(rows, start=1):
        missing = [column for column in ZERO_SHOT[task].columns if column not in row]
        if missing:
            raise BadInput(f"eval.data_root: row {number} of {file} has no column {missing[0]!r}")


@lru_cache
def _task_manager(tasks: tuple[str, ...]) -> Any:
    """An index of the task files that are needed; of all of them only for a task that is not known here."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    stock = Path(lm_eval.__file__).parent / "tasks"
    folders = [stock / ZERO_SHOT[task].folder for task in tasks if task in ZERO_SHOT]
    everything = not all(task in MICROWORLD_TASKS or task in ZERO_SHOT for task in tasks)
    everything = everything or not all(folder.is_dir() for folder in folders)
    own = [MICROWORLD_FOLDER] + ([] if everything else sorted(set(folders)))
    return TaskManager(include_defaults=everything, include_path=own)


def _score(scores: dict[str, Any], name: str) -> dict[str, Any]:
    """One task of lm-eval's results, whose keys are ``<metric>,<filter>`` and ``<metric>_stderr,<filter>``."""
    values = {key.partition(",")[0]: value for key, value in scores["results"][name].items() if "," in key}
    metrics = [metric for metric in values if not metric.endswith("_stderr")]
    metric = "acc" if "acc" in metrics else metrics[0]
    score = {
        "metric": metric,
        "value": float(values[metric]),
        "stderr": _number(values.get(f"{metric}_stderr")),
        "n": scores["n-samples"][name]["effective"],
        "version": scores["versions"][name],
    }
    if "acc_norm" in metrics:
        score["acc_norm"] = float(values["acc_norm"])
        score["acc_norm_stderr"] = _number(values.get("acc_norm_stderr"))
    if metric == "acc":
        score |= _correct(scores["samples"][name])
    return score


def _correct(samples: list[dict[str, Any]]) -> dict[str, str]:
    """Which items were right, in the order of the task; nothing where an item can be half right."""
    values = {sample["doc_id"]: float(sample["acc"]) for sample in samples if "acc" in sample}
    if not set(values.values()) <= {0.0, 1.0}:
        return {}
    return {"correct": "".join(str(int(values[item])) for item in sorted(values))}


def _number(value: Any) -> float | None:
    """A standard error; None where lm-eval has none ("N/A", as for a single item)."""
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None


def _average(tasks: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    names = [name for name, score in tasks.items() if score["metric"] == "acc"]
    if not names:
        return None
    errors = [tasks[name]["stderr"] for name in names]
    known = all(error is not None for error in errors)
    return {
        "metric": "acc",
        "value": math.fsum(tasks[name]["value"] for name in names) / len(names),
        "stderr": math.sqrt(math.fsum(error**2 for error in errors)) / len(names) if known else None,
        "tasks": names,
    }


@contextmanager
def _lean_lm_eval() -> Iterator[None]:
    """lm-eval and datasets without their bars and notices, and each prompt template compiled once."""
    import datasets
    import lm_eval.api.task
    import lm_eval.utils

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.utils.are_progress_bars_disabled()
    bar = lm_eval.api.task.tqdm
    environment = lm_eval.utils.env
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.utils.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(bar, disable=True)
    # A quarter of the time of an evaluation of a small model goes into compiling the same few templates.
    environment.from_string = lru_cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.utils.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
