"""Tasks of lm-eval beside the seven: data sets of our own stand in for the Hub, and no code of it runs."""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from lm_eval import tasks
from test_evaluate import TOKENIZER, VOCABULARY, eval_cfg, refused, tiny

from harness import evaluate as evaluate_module
from harness.errors import BadInput
from harness.evaluate import check_scoring, check_tasks, evaluate
from harness.log_likelihood import PromptSharingLM

PROBLEMS = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(8)]


@pytest.fixture
def gsm8k_alone(monkeypatch):
    """In place of lm-eval's ten thousand tasks, of which the index takes many seconds."""
    whole, folder = tasks.TaskManager, Path(tasks.__file__).parent / "gsm8k"

    def index(include_defaults, include_path):
        assert include_defaults, "a task that is none of ours"
        return whole(include_defaults=False, include_path=[*include_path, folder])

    monkeypatch.setattr(tasks, "TaskManager", index)
    evaluate_module._task_manager.cache_clear()
    yield
    evaluate_module._task_manager.cache_clear()


def test_gsm8k_is_generated_and_its_strict_answer_counts(gsm8k_alone, monkeypatch):
    """As lm-eval has the task, with its five examples, on a model that says one thing and a data set of our own."""
    splits = {"train": PROBLEMS[3:], "test": PROBLEMS[:4]}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda **_: {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    )
    prompts = []

    def generated(self, requests, **_):
        prompts.extend(request.args[0] for request in requests)
        return ["it is 1\n#### 1", "#### 2", "it is 3", "nothing"]

    cfg = eval_cfg(["gsm8k"], limit=None)
    check_tasks(cfg, TOKENIZER, VOCABULARY)
    with monkeypatch.context() as patched:
        patched.setattr(PromptSharingLM, "generate_until", generated)
        score = evaluate(tiny(), TOKENIZER, cfg, None, progress=False)["tasks"]["gsm8k"]
    assert all(prompt.count("Question:") == 6 and prompt.endswith("Answer:") for prompt in prompts)
    assert (score["metric"], score["filter"], score["value"]) == ("exact_match", "strict-match", 0.5)
    assert score["by_filter"] == {"strict-match": 0.5, "flexible-extract": 0.75}
    assert score["stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    with pytest.raises(BadInput, match=r"eval.tasks=gsm8k: answers of up to 256 tokens; .* the 128 positions"):
        check_scoring(tiny(), TOKENIZER, cfg)
    roomy = tiny(max_position_embeddings=512)
    check_scoring(roomy, TOKENIZER, cfg)
    cfg.limit = 1
    wordless = evaluate(roomy, TOKENIZER, cfg, None, progress=False)["tasks"]["gsm8k"]  # really generated
    assert wordless["value"] == 0 and wordless["n"] == 1


def test_code_from_the_hub_and_from_the_model_is_not_run(monkeypatch):
    import evaluate as metrics

    own = metrics.load
    index = SimpleNamespace(task_index={"odd": 1})  # stands in for lm-eval's of ten thousand tasks
    monkeypatch.setattr(evaluate_module, "_task_manager", lambda every: index)

    def load(names):
        metrics.load("rouge").compute()

    def quiet(names):
        with contextlib.suppress(AttributeError):  # as lm-eval itself does
            metrics.load("rouge").compute()
        return {"tasks": {}}

    for index.load in (load, quiet):
        line = "eval.tasks=odd: runs the code of a metric from the Hub (rouge), which is never run here"
        assert refused(eval_cfg(["odd"])) == line
    assert "eval.tasks: unknown task 'bolq'; must be a task of lm-eval, or one of micro" in refused(eval_cfg(["bolq"]))
    index.load = lambda names: {"tasks": {"odd_2": SimpleNamespace(UNSAFE_CODE=True)}}
    line = "eval.tasks=odd: odd_2 runs code that the model writes, which is never run here"
    assert refused(eval_cfg(["odd"])) == line
    assert metrics.load is own
