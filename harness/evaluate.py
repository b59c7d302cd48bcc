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

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from harness import microworld
from harness.data import Row, check_token_ids
from harness.errors import BadInput, one_line
from harness.hub import commit_in, fault, knock
from harness.perplexity import held_out_perplexity, perplexity, perplexity_windows
from harness.processes import is_first
from harness.stock_tasks import ZERO_SHOT, local_items
from lors.randomness import modes_kept, random_state_kept

__all__ = ["ZERO_SHOT", "check_scoring", "check_tasks", "commits_of_tasks", "evaluate"]

MICROWORLD_TASKS = {f"microworld_{task}": task for task in microworld.TASKS}
MICROWORLD_FOLDER = Path(microworld.__file__).parent / "tasks"
MARGIN_DIGITS = 4  # of an item, in nats
BOOTSTRAP = 1000  # draws for the standard error of a metric that is no mean; that of a mean is exact
# Data sets of tasks that this process has loaded from the Hub: all models of a run are scored on the same items.
FROM_HUB: dict[str, Any] = {}
FEWSHOT_SEED = 1234  # lm-eval's default; for tasks that bring examples, which none of the seven does


def check_tasks(eval_cfg: Any, tokenizer: Tokenizer, vocabulary: int) -> LongTensor | None:
    """Find what is wrong with the tasks and the text of a config before a model is loaded.

    Data sets from the Hub are really loaded, for nothing else shows that they can be; they are in the cache of
    `datasets` then. The model knows the tokens 0 to `vocabulary` - 1.

    Returns:
        The text of ``eval.perplexity`` in windows, see `perplexity_windows`; None without one.

    Raises:
        BadInput: An unknown task or text; one that cannot be reached or that runs code; in ``data_root`` a missing
            file, a malformed line, a missing column, or one that holds something else than the task reads; a text
            that is shorter than a window; in a task or the text a token that the model does not know.
    """
    if getattr(eval_cfg, "chat_template", False) and not tokenizer.chat_template:
        raise BadInput("eval.chat_template=true: the tokenizer of the model has no chat template; must be false")
    if not set(eval_cfg.tasks) <= MICROWORLD_TASKS.keys():
        _load_tasks(eval_cfg)
    check_token_ids(_task_tokens(eval_cfg, tokenizer), tokenizer, vocabulary, "eval.tasks")
    if eval_cfg.perplexity is None:
        return None
    windows = perplexity_windows(tokenizer, eval_cfg)
    check_token_ids([int(windows.max())], tokenizer, vocabulary, "eval.perplexity.text")
    return windows


def _task_tokens(eval_cfg: Any, tokenizer: Tokenizer) -> Iterator[int]:
    """The tokens of everything that the tasks ask."""
    for task in _load_tasks(eval_cfg)["tasks"].values() if eval_cfg.tasks else ():
        task.build_all_requests(limit=eval_cfg.limit)
        for request in task.instances:
            # Prompt, then prompt and answer, as they are encoded.
            for text in accumulate(part for part in request.args if isinstance(part, str)):
                yield from tokenizer.encode(text, add_special_tokens=False, verbose=False)


def commits_of_tasks(names: Sequence[str]) -> dict[str, str]:
    """The commits of the data sets of those of the tasks that this process has loaded from the Hub."""
    commits = {name: commit_in(next(iter(FROM_HUB[name].values()))) for name in names if FROM_HUB.get(name)}
    return {name: commit for name, commit in commits.items() if commit is not None}


def check_scoring(model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any) -> None:
    """Score a few words as `evaluate` will, before a model is trained; what the model raises is raised.

    Raises:
        BadInput: A task wants longer answers than the model has positions.
    """
    with modes_kept(model):
        model.eval()
        if eval_cfg.tasks:
            lm = _language_model(model, tokenizer, eval_cfg, progress=False)
            for name, task in _load_tasks(eval_cfg)["tasks"].items():
                options = task.config.generation_kwargs or {}
                wanted = options.get("max_gen_toks", lm.max_gen_toks)
                if task.OUTPUT_TYPE == "generate_until" and wanted >= lm.max_length:
                    raise BadInput(
                        f"eval.tasks={name}: answers of up to {wanted} tokens; must be a task that leaves room for its "
                        f"prompt in the {lm.max_length} positions of the model"
                    )
        if eval_cfg.perplexity is not None:
            perplexity(model, torch.tensor([[0, 1]]), progress=False)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    eval_cfg: Any,
    windows: LongTensor | None,
    held_out: Sequence[Row] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Score a model on the tasks and texts of ``conf/eval``; its mode is afterwards what it was.

    Args:
        eval_cfg: ``tasks``, ``data_root``, ``limit`` (first items of each task), ``batch_size`` (rows per forward
            pass), ``add_bos_token``, ``chat_template``, ``perplexity.text``, ``split`` (of the microworld's items: test
            or validation).
        windows: The text whose perplexity is measured, see `check_tasks`; None: no perplexity.
        held_out: Rows of instructions whose answers' perplexity is measured, see `data.held_out_rows`.

    Returns:
        ``tasks``: name -> {metric, value, stderr, n, version, commit (of its data set, if it comes from the Hub), and
            where the task has them acc_norm,
            acc_norm_stderr, and correct: a text of "1" (by `acc`) and "0", one for each item in the task's order; and
            margin, margin_stderr and margins: by how much the right answer is likelier than the best wrong one};
        ``average``: {metric: acc, value, stderr, tasks (the averaged names)} or None without a task that has `acc`;
        ``perplexity``: see `perplexity.perplexity`, with ``text``; or None;
        ``held_out``: see `perplexity.held_out_perplexity`; or None.

    Raises:
        BadInput: See `check_tasks`.
    """
    progress = progress and is_first()
    with modes_kept(model):
        model.eval()
        tasks = _zero_shot(model, tokenizer, eval_cfg, progress) if eval_cfg.tasks else {}
        text = None
        if windows is not None:
            text = {"text": eval_cfg.perplexity.text, **perplexity(model, windows, progress=progress)}
        answers = held_out_perplexity(model, held_out, progress=progress) if held_out else None
    return {"tasks": tasks, "average": _average(tasks), "perplexity": text, "held_out": answers}


def _average(tasks: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    averaged = {name: score for name, score in tasks.items() if score["metric"] == "acc"}
    if not averaged:
        return None
    errors = [score["stderr"] for score in averaged.values()]
    return {
        "metric": "acc",
        "value": math.fsum(score["value"] for score in averaged.values()) / len(averaged),
        "stderr": None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(averaged),
        "tasks": list(averaged),
    }


@random_state_kept()
def _zero_shot(
    model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any, progress: bool
) -> dict[str, dict[str, Any]]:
    loaded = _load_tasks(eval_cfg)
    lm = _language_model(model, tokenizer, eval_cfg, progress)
    chat = getattr(eval_cfg, "chat_template", False)
    scores = _lm_eval().evaluate(
        lm, loaded, limit=eval_cfg.limit, bootstrap_iters=BOOTSTRAP, log_samples=True, apply_chat_template=chat
    )
    return {name: _score(scores, name, task) for name, task in loaded["tasks"].items()}


def _language_model(model: PreTrainedModel, tokenizer: Tokenizer, eval_cfg: Any, progress: bool) -> Any:
    _lm_eval()
    from harness.log_likelihood import PromptSharingLM

    return PromptSharingLM(
        model, tokenizer, batch_size=eval_cfg.batch_size, add_bos_token=eval_cfg.add_bos_token, progress=progress
    )


@random_state_kept()
def _load_tasks(eval_cfg: Any) -> dict[str, Any]:
    """The tasks of a config as lm-eval takes them, with their data sets; BadInput as `check_tasks`."""
    shown = f"eval.tasks={','.join(eval_cfg.tasks)}"
    own = [*MICROWORLD_TASKS, *ZERO_SHOT]
    others = [task for task in eval_cfg.tasks if task not in own]
    manager = _task_manager(bool(others))
    for task in others:
        if task not in manager.task_index:
            near = ", ".join(own)
            raise BadInput(f"eval.tasks: unknown task {task!r}; must be a task of lm-eval, or one of {near}")
    specifications = [_specification(name, eval_cfg) for name in eval_cfg.tasks]
    with _no_metric_code() if others else nullcontext() as refused:
        try:
            # An override of a stock task works only inside a group's list.
            loaded = manager.load([{"group": "lors", "task": specifications}])
        except Exception as error:  # of any of five libraries
            if not refused:
                works = "without a network a copy of the data set in the cache of datasets works"
                works += ", for the seven tasks of the papers eval.data_root=FOLDER too"
                raise BadInput(f"{shown}: cannot be loaded ({fault(error) or one_line(error)}); {works}") from error
    if refused:  # some tasks fail without their metric, some would only later
        raise BadInput(f"{shown}: runs the code of a metric from the Hub ({refused[0]}), which is never run here")
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise BadInput(f"{shown}: {name} runs code that the model writes, which is never run here")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        in_folder = name in ZERO_SHOT and eval_cfg.data_root is not None
        if type(task).__name__ == "ConfigurableTask" and name not in MICROWORLD_TASKS and not in_folder:
            FROM_HUB[name] = task.dataset
    return loaded


def _specification(name: str, eval_cfg: Any) -> dict[str, Any]:
    """A task as lm-eval loads it: its name, with the items unless lm-eval itself knows where they are.

    Not the name alone: lm-eval 0.4.13 gives such a member of a group the name of all members.
    """
    import datasets

    if name in MICROWORLD_TASKS:
        split = "test"
        items = microworld.task_rows(MICROWORLD_TASKS[name], getattr(eval_cfg, "split", "test"))
    elif name in ZERO_SHOT and eval_cfg.data_root is not None:
        split = ZERO_SHOT[name].split
        items = local_items(eval_cfg.data_root, name)
    elif name in FROM_HUB:
        return {"task": name, "custom_dataset": lambda **_: FROM_HUB[name]}
    else:
        knock()
        return {"task": name}
    splits = dict.fromkeys(("training_split", "validation_split", "test_split"), split)  # no other is looked for then
    return {"task": name, **splits, "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(items)}}


@cache
def _task_manager(every: bool) -> Any:
    """lm-eval's index of the microworld's tasks and the seven of the papers, or of all, which takes seconds."""
    stock = Path(_lm_eval().__file__).parent / "tasks"
    folders = {stock / task.folder for task in ZERO_SHOT.values()}
    return _lm_eval().tasks.TaskManager(include_defaults=every, include_path=[MICROWORLD_FOLDER, *sorted(folders)])


@contextmanager
def _no_metric_code() -> Iterator[list[str]]:
    """Refuse metrics that the library `evaluate` gets from the Hub as code; gives the list of those refused."""
    import evaluate as metrics

    refused: list[str] = []
    load, metrics.load = metrics.load, lambda path, *_, **__: refused.append(path)
    try:
        yield refused
    finally:
        metrics.load = load


def _score(scores: dict[str, Any], name: str, task: Any) -> dict[str, Any]:
    """One task of lm-eval's results, whose keys are ``<metric>,<filter>`` and ``<metric>_stderr,<filter>``.

    A filter reads the answer off what was generated; the first one of a task counts, as in lm-eval's own leaderboards,
    and the others are recorded beside it.
    """
    found = scores["results"][name]
    values = {key: None if found[key] == "N/A" else found[key] for key in found if "," in key}
    metrics = [key for key in values if not key.partition(",")[0].endswith("_stderr")]
    of_name = {key.partition(",")[0]: key for key in reversed(metrics)}
    key = of_name.get("acc", metrics[0])
    metric, _, chosen = key.partition(",")
    score = {
        "metric": metric,
        "value": float(values[key]),
        "stderr": values.get(f"{metric}_stderr,{chosen}"),
        "n": scores["n-samples"][name]["effective"],
        "version": scores["versions"][name],
    }
    score |= {"commit": commit} if (commit := commits_of_tasks([name]).get(name)) else {}
    if "acc_norm" in of_name:
        normed = of_name["acc_norm"]
        error = values.get(normed.replace("acc_norm", "acc_norm_stderr"))
        score |= {"acc_norm": float(values[normed]), "acc_norm_stderr": error}
    others = {key.partition(",")[2]: float(values[key]) for key in metrics if key.startswith(f"{metric},")}
    if len(others) > 1:
        score |= {"filter": chosen, "by_filter": others}
    if metric == "acc":
        score |= _correct(scores["samples"][name])
    if task.OUTPUT_TYPE == "multiple_choice":
        score |= _margins(scores["samples"][name], task)
    return score


def _correct(samples: list[dict[str, Any]]) -> dict[str, str]:
    """Which items were right, in the order of the task; nothing where an item can be half right."""
    values = {sample["doc_id"]: float(sample["acc"]) for sample in samples if "acc" in sample}
    if not set(values.values()) <= {0.0, 1.0}:
        return {}
    return {"correct": "".join(str(int(values[item])) for item in sorted(values))}


def _margins(samples: list[dict[str, Any]], task: Any) -> dict[str, Any]:
    """By how much the right answer is likelier than the best wrong one: of each item, in the order of the task and in
    nats, with mean and standard error; nothing where an item has several right answers."""
    right = task.doc_to_text if task.multiple_input else task.doc_to_target
    margins = []
    for _, sample in sorted({sample["doc_id"]: sample for sample in samples}.items()):
        gold, scores = right(sample["doc"]), [score for score, _ in sample["filtered_resps"]]
        answers = task.doc_to_choice(sample["doc"])
        gold = answers.index(gold) if gold in answers else gold
        if not isinstance(gold, int) or len(scores) != len(answers):
            return {}
        margins.append(scores.pop(gold) - max(scores))
    values = torch.tensor(margins, dtype=torch.float64)
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    shown = [round(margin, MARGIN_DIGITS) for margin in margins]
    return {"margin": values.mean().item(), "margin_stderr": error, "margins": shown}


@cache
def _lm_eval() -> Any:
    """lm-eval, it and datasets without their bars and notices, and each prompt template compiled once."""
    import datasets
    import lm_eval.api.task
    import lm_eval.tasks

    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.utils.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)
    # A quarter of the time of an evaluation of a small model goes into compiling the same few templates.
    lm_eval.utils.env.from_string = lru_cache(lm_eval.utils.env.from_string)
    return lm_eval
