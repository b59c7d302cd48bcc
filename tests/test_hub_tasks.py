"""Tasks and texts of the Hub, without a network: data sets of our own stand in for it, and no code of it runs."""

import contextlib
import math
from types import SimpleNamespace

import datasets
import pytest
from test_evaluate import (  # noqa: F401 (a fixture)
    TOKENIZER,
    VOCABULARY,
    data_root,
    eval_cfg,
    items,
    refused,
    text_cfg,
    tiny,
)

from harness import evaluate as evaluate_module
from harness.corpora import texts
from harness.errors import BadInput
from harness.evaluate import check_scoring, check_tasks, evaluate
from harness.log_likelihood import PromptSharingLM

PROBLEMS = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(8)]


def test_gsm8k_is_generated_and_its_strict_answer_counts(monkeypatch):
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
    wordless = evaluate(roomy, TOKENIZER, cfg, None, progress=False)["tasks"]["gsm8k"]  # really generated
    assert wordless["value"] == 0 and wordless["n"] == 4


def test_stock_tasks_from_the_hub_score_as_from_a_folder(data_root, monkeypatch):  # noqa: F811
    """lm-eval's own loading, of a data set of the Hub that is patched in."""
    of_path = {"super_glue": "boolq", "openbookqa": "openbookqa", "allenai/openbookqa": "openbookqa"}

    def load_dataset(path, name=None, **_):
        task = of_path[path.rpartition("aps/")[2]]
        return dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(items(task)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks = ["boolq", "openbookqa"]
    from_hub, from_folder = (
        evaluate(tiny(), TOKENIZER, eval_cfg(tasks, root), None, progress=False) for root in (None, data_root)
    )
    assert from_hub == from_folder


def test_what_is_scored_is_kept_and_what_is_trained_on_is_streamed(monkeypatch):
    import datasets

    streamed = {}

    def load(name, config, *, streaming, **_):
        streamed[name] = streaming
        return iter([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [list(texts(source)) for source in ("c4", "wikitext", "some/set:part")] == [["a"]] * 3
    assert streamed == {"allenai/c4": True, "Salesforce/wikitext": False, "some/set": True}


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
