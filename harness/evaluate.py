"""Scores of a model: zero-shot accuracy through lm-evaluation-harness, and perplexity.

Three sources of tasks, all by their lm-eval names in ``eval.tasks``:

- ``microworld_boolq`` ... : seven tasks about the embedded world, spelled out in ``harness/microworld/tasks``;
- the seven of the papers (`stock_tasks`): lm-eval's own, from the Hub, or from a file
  ``<eval.data_root>/<task>/<split>.jsonl``;
- any other task of lm-eval, from the Hub.

Whatever can be wrong with a task or a text is found by `check_tasks`, without a model, and whatever a model cannot
do by `check_scoring`, before it is trained. No code from the Hub is run.

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
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import LongTensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness import microworld
from harness.data import check_token_ids
from harness.errors import BadInput, one_line
from harness.perplexity import perplexity, perplexity_windows
from harness.stock_tasks import ZERO_SHOT, local_items
from lors.randomness import modes_kept, random_state_kept

__all__ = ["ZERO_SHOT", "check_scoring", "check_tasks", "evaluate"]

MICROWORLD_TASKS = {f"microworld_{task}": task for task in microworld.TASKS}
MICROWORLD_FOLDER = Path(microworld.__file__).parent / "tasks"
BOOTSTRAP = 1000  # draws for the standard error of a metric that is no mean; that of a mean is exact
NEVER = "which is never run here"
FEWSHOT_SEED = 1234  # lm-eval's default; for tasks that bring examples, which none of the seven does


def check_tasks(eval_cfg: Any, tokenizer: Tokenizer, vocabulary: int) -> LongTensor | None:
    """Find what is wrong with the tasks and the text of a config before a model is loaded.

    Data sets from the Hub are really loaded, for nothing else shows that they can be; they are in the cache of
    `datasets` then.

    Args:
        eval_cfg: ``tasks``, ``data_root``, ``limit``, ``add_bos_token``, ``perplexity``.
        tokenizer: The model's.
        vocabulary: Tokens that the model knows.

    Returns:
        The text of ``eval.perplexity`` in windows, see `perplexity_windows`; None without one.

    Raises:
        BadInput: An unknown task or text; one that cannot be reached or that runs code; in ``data_root`` a missing
            file, a malformed line, a missing column, or one that holds something else than the task reads; a text
            that is shorter than a window; a token that the model does not know.
    """
    root = eval_cfg.data_root
    if root is not None and not os.path.isdir(os.path.expanduser(root)):
        raise BadInput(f"eval.data_root={root}: no such folder")
    others = [task for task in eval_cfg.tasks if task not in MICROWORLD_TASKS and task not in ZERO_SHOT]
    if others:
        known = _task_manager(tuple(others)).task_index
        for task in others:
            if task not in known:
                near = ", ".join([*MICROWORLD_TASKS, *ZERO_SHOT])
                raise BadInput(f"eval.tasks: unknown task {task!r}; must be a task of lm-eval, or one of {near}")
    if not set(eval_cfg.tasks) <= MICROWORLD_TASKS.keys():
        with _loaded_tasks(eval_cfg):
            pass
    windows = None if eval_cfg.perplexity is None else perplexity_windows(tokenizer, eval_cfg)
    tokens = _task_tokens(eval_cfg, tokenizer)
    check_token_ids(tokens, tokenizer, vocabulary, "eval.tasks")
    check_token_ids(
        (int(row.max()) for row in (() if windows is None else windows)), tokenizer, vocabulary, "eval.perplexity.text"
    )
    return windows


def check_scoring(model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any) -> None:
    """Score a few words as `evaluate` will score the tasks and the text, before a model is trained.

    Args:
        model: The model, on its device; in its former mode afterwards.
        tokenizer: The model's; not changed.
        eval_cfg: As for `evaluate`.

    Raises:
        Exception: What the model raises where it cannot be scored at all.
    """
    with modes_kept(model):
        model.eval()
        if eval_cfg.tasks:
            with _lean_lm_eval():
                _language_model(model, tokenizer, eval_cfg, progress=False)
        if eval_cfg.perplexity is not None:
            perplexity(model, torch.tensor([[0, 1]]), progress=False)


def evaluate(
    model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any, windows: LongTensor | None, progress: bool = True
) -> dict[str, Any]:
    """Score a model on the tasks and the text of ``conf/eval``.

    Args:
        model: The model, on its device; in its former mode afterwards.
        tokenizer: The model's; not changed.
        eval_cfg: ``tasks``, ``data_root``, ``limit`` (first items of each task), ``batch_size`` (fixed: rows
            per forward pass), ``add_bos_token``, ``perplexity.text`` (a name),
            ``split`` (of the microworld's items: test or validation; test where nothing is said).
        windows: The text whose perplexity is measured, see `check_tasks`; None: no perplexity.
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
    with modes_kept(model):
        model.eval()
        tasks = _zero_shot(model, tokenizer, eval_cfg, progress) if eval_cfg.tasks else {}
        text = None
        if windows is not None:
            text = {"text": eval_cfg.perplexity.text, **perplexity(model, windows, progress=progress)}
    averaged = {name: score for name, score in tasks.items() if score["metric"] == "acc"}
    if not averaged:
        return {"tasks": tasks, "average": None, "perplexity": text}
    errors = [score["stderr"] for score in averaged.values()]
    known = all(error is not None for error in errors)
    average = {
        "metric": "acc",
        "value": math.fsum(score["value"] for score in averaged.values()) / len(averaged),
        "stderr": math.sqrt(math.fsum(error**2 for error in errors)) / len(averaged) if known else None,
        "tasks": list(averaged),
    }
    return {"tasks": tasks, "average": average, "perplexity": text}


def _zero_shot(
    model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any, progress: bool
) -> dict[str, dict[str, Any]]:
    with _loaded_tasks(eval_cfg) as loaded:
        import lm_eval

        lm = _language_model(model, tokenizer, eval_cfg, progress)
        scores = lm_eval.evaluate(lm, loaded, limit=eval_cfg.limit, bootstrap_iters=BOOTSTRAP, log_samples=True)
    return {name: _score(scores, name) for name in loaded["tasks"]}


def _language_model(model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any, progress: bool) -> Any:
    from harness.log_likelihood import PromptSharingLM

    return PromptSharingLM(
        model,
        copy.deepcopy(tokenizer),  # because lm-eval gives a tokenizer without padding token one
        batch_size=eval_cfg.batch_size,
        add_bos_token=eval_cfg.add_bos_token,
        progress=progress,
    )


@contextmanager
def _loaded_tasks(eval_cfg: Any) -> Iterator[dict[str, Any]]:
    """The tasks of a config as lm-eval takes them, with their data sets.

    Raises:
        BadInput: They cannot be loaded, or run code that is not part of lm-eval.
    """
    folder = tempfile.TemporaryDirectory(prefix="lors-eval-")
    with folder, _lean_lm_eval(), random_state_kept(), _no_metric_code(eval_cfg.tasks) as refused:
        manager = _task_manager(tuple(eval_cfg.tasks))
        specifications = _specifications(eval_cfg, Path(folder.name))
        shown = f"eval.tasks={','.join(eval_cfg.tasks)}"
        try:
            loaded = manager.load(specifications)
        except Exception as error:  # of any of five libraries
            if not refused:
                works = "a copy of the data set in the cache of datasets works without a network"
                if eval_cfg.data_root is None and set(eval_cfg.tasks) <= {*MICROWORLD_TASKS, *ZERO_SHOT}:
                    works = f"eval.data_root=FOLDER, or {works}"
                raise BadInput(f"{shown}: cannot be loaded ({one_line(error)}); {works}") from error
        if refused:  # some tasks fail without their metric, some would only later
            raise BadInput(f"{shown}: runs the code of a metric from the Hub ({refused[0]}), {NEVER}")
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise BadInput(f"{shown}: {name} runs code that the model writes, {NEVER}")
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        yield loaded


def _task_tokens(eval_cfg: Any, tokenizer: Tokenizer) -> Iterator[int]:
    """The tokens of everything that the tasks ask."""
    if not eval_cfg.tasks:
        return
    with _loaded_tasks(eval_cfg) as loaded:
        for task in loaded["tasks"].values():
            task.build_all_requests(limit=eval_cfg.limit)
            for request in task.instances:
                # Prompt, then prompt and answer, as they are encoded.
                for text in accumulate(part for part in request.args if isinstance(part, str)):
                    yield from tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _specifications(eval_cfg: Any, folder: Path) -> list[Any]:
    """The tasks as lm-eval loads them: plain names, and one group of stock tasks whose data set is a local
    file.

    An override of a stock task works only inside a group's list. `folder` holds what has to be written.
    """
    local: list[dict[str, Any]] = []
    plain: list[str] = []
    for name in eval_cfg.tasks:
        if name in MICROWORLD_TASKS:
            split, keys = "test", {}
            items = microworld.task_rows(MICROWORLD_TASKS[name], getattr(eval_cfg, "split", "test"))
        elif name in ZERO_SHOT and eval_cfg.data_root is not None:
            # Every split that the task would look for has to be named, or be null.
            split = ZERO_SHOT[name].split
            splits = {"training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split}
            keys = {"dataset_path": "json", "dataset_name": None, **splits}
            items = local_items(eval_cfg.data_root, name)
        else:
            plain.append(name)
            continue
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        # Its cache is of our own too.
        files = {"data_files": {split: str(file.resolve())}, "cache_dir": str(folder / "cache")}
        local.append({"task": name, **keys, "dataset_kwargs": files})
    return [*plain, {"group": "lors_local", "task": local}] if local else plain


def _task_manager(tasks: tuple[str, ...]) -> Any:
    """An index of the task files that are needed; of all of them only for a task that is not known here."""
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks"
    folders = {stock / ZERO_SHOT[task].folder for task in tasks if task in ZERO_SHOT}
    known = all(task in MICROWORLD_TASKS or task in ZERO_SHOT for task in tasks)
    return _index(tuple(sorted(folders)) if known and all(folder.is_dir() for folder in folders) else None)


@lru_cache
def _index(folders: tuple[Path, ...] | None) -> Any:
    """lm-eval's index of the microworld and of the tasks in some folders; None: of all, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=folders is None, include_path=[MICROWORLD_FOLDER, *(folders or ())])


@contextmanager
def _no_metric_code(tasks: Iterable[str]) -> Iterator[list[str]]:
    """Refuse metrics that the library `evaluate` gets from the Hub as code; gives the list of those refused."""
    refused: list[str] = []
    if all(task in MICROWORLD_TASKS or task in ZERO_SHOT for task in tasks):  # which need none, nor that library
        yield refused
        return
    import evaluate as metrics

    def refuse(path: str, *_: Any, **__: Any) -> NoReturn:
        refused.append(path)
        raise PermissionError(f"the metric {path} is code from the Hub, {NEVER}")

    load, metrics.load = metrics.load, refuse
    try:
        yield refused
    finally:
        metrics.load = load


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
