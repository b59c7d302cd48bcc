"""Scores of a model: prompts, averages, bad input; without a network and without a trace."""

import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama, make_tokenizer, sentence, write_rows

from harness import evaluate as evaluate_module
from harness import microworld
from harness.errors import BadInput
from harness.evaluate import MICROWORLD_TASKS, check_scoring, check_tasks, evaluate
from harness.log_likelihood import PromptSharingLM
from harness.stock_tasks import ZERO_SHOT

TOKENIZER = make_tokenizer()
VOCABULARY = len(TOKENIZER)
ITEMS = 5
WITH_NORM = {"hellaswag", "arc_easy", "arc_challenge", "openbookqa"}


def choices(i, labels="ABCD"):
    return {"text": [f'{sentence(i + k, 2 + k)} "it\'s" {k}' for k in range(len(labels))], "label": list(labels)}


def items(task):
    """A few items in the columns of the real data set, with quotes, blanks and odd labels."""
    rows = []
    for i in range(ITEMS):
        a, b = sentence(i), sentence(i + 3, 4)
        if task == "boolq":
            rows.append({"question": b, "passage": f"{a} {b}.\nNew line", "idx": i, "label": i % 2})
        elif task == "rte":
            rows.append({"sentence1": a, "sentence2": b, "label": i % 2, "idx": i})
        elif task == "hellaswag":
            endings = [f" {text}" if k else text for k, text in enumerate(choices(i)["text"])]
            head = {"activity_label": "Red house", "ctx_a": a + ".", "ctx_b": "" if i == 0 else b, "ctx": ""}
            rows.append({**head, "endings": endings, "split": "val", "label": str(i % 4)})
        elif task == "winogrande":
            text = f'{a} said "no" because _  was {b}.'
            rows.append({"sentence": text, "option1": "the cat's", "option2": 'a "dog"', "answer": str(1 + i % 2)})
        elif task == "openbookqa":
            key = " B" if i == 1 else "ABCD"[i % 4]
            rows.append({"id": str(i), "question_stem": a, "choices": choices(i), "answerKey": key})
        else:
            labels = ("ABCD", "1234", "ABC", "ABCDE", "ABCD")[i]
            rows.append({"id": str(i), "question": a, "choices": choices(i, labels), "answerKey": labels[i % 3]})
    return rows


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task, stock in ZERO_SHOT.items():
        write_rows(folder / task / f"{stock.split}.jsonl", items(task))
    return folder


@pytest.fixture
def world(monkeypatch):
    """The microworld's tasks with the items above, so that they can be held against the stock tasks."""
    monkeypatch.setattr(microworld, "task_rows", lambda task, split: items(task))


def eval_cfg(tasks=(), data_root=None, **fields):
    base = {"limit": None, "batch_size": 8, "add_bos_token": True, "perplexity": None}
    root = None if data_root is None else str(data_root)
    return SimpleNamespace(**(base | {"tasks": list(tasks), "data_root": root} | fields))


def text_cfg(source, window, windows=None):
    return SimpleNamespace(text=str(source), window=window, windows=windows)


def check(cfg, tokenizer=TOKENIZER, vocabulary=VOCABULARY):
    return check_tasks(cfg, tokenizer, vocabulary)


def refused(cfg, **fields):
    """The one line with which the check refuses a config."""
    with pytest.raises(BadInput) as caught:
        check(cfg, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tiny(**fields):
    return make_tiny_llama(vocab_size=len(TOKENIZER), initializer_range=0.3, **fields)


# ---- tasks


def prompts(tasks, data_root):
    """What lm-eval asks of a model: (prompt, answer) of each request, and each item's right answer."""
    asked, right = {}, {}
    for name, task in evaluate_module._load_tasks(eval_cfg(tasks, data_root))["tasks"].items():
        task.build_all_requests()
        asked[name] = [instance.args for instance in task.instances]
        right[name] = [
            task.doc_to_text(doc) if name.endswith("winogrande") else task.doc_to_target(doc) for doc in task.eval_docs
        ]
    return asked, right


def test_the_microworld_tasks_ask_exactly_what_the_stock_tasks_ask(world, data_root, no_network):
    stock = prompts(ZERO_SHOT, data_root)
    own = prompts(MICROWORLD_TASKS, None)
    for task in ZERO_SHOT:
        assert own[0][f"microworld_{task}"] == stock[0][task], task
        assert own[1][f"microworld_{task}"] == stock[1][task], task
    asked = stock[0]
    assert asked["boolq"][1] == (f"{items('boolq')[0]['passage']}\nQuestion: {sentence(3, 4)}?\nAnswer:", " yes")
    assert asked["rte"][0][1] == " True"
    assert asked["winogrande"][0][0].endswith("because the cat's")
    assert stock[1]["arc_easy"] == [0, 1, 2, 0, 1]


# ---- scores


def test_scores_of_all_tasks_from_local_files(world, data_root, no_network):
    model = tiny().train()
    cfg = eval_cfg([*ZERO_SHOT, *MICROWORLD_TASKS], data_root)
    state = random.getstate(), torch.get_rng_state()
    pad_token = TOKENIZER.pad_token
    result = evaluate(model, TOKENIZER, cfg, check(cfg), progress=False)
    assert (random.getstate(), pad_token) == (state[0], TOKENIZER.pad_token)
    assert torch.equal(torch.get_rng_state(), state[1])
    assert model.training

    tasks = result["tasks"]
    assert set(tasks) == {*ZERO_SHOT, *MICROWORLD_TASKS}
    for task in ZERO_SHOT:
        score = tasks[task]
        own = tasks[f"microworld_{task}"]
        assert own.keys() == score.keys() and own["correct"] == score["correct"]
        assert own["margins"] == pytest.approx(score["margins"], abs=1e-4)  # in batches of other tasks' items
        assert (score["metric"], score["n"]) == ("acc", ITEMS)
        assert len(score["correct"]) == ITEMS and score["correct"].count("1") / ITEMS == pytest.approx(score["value"])
        assert score["stderr"] == pytest.approx(math.sqrt(score["value"] * (1 - score["value"]) / (ITEMS - 1)))
        assert ("acc_norm" in score) == (task in WITH_NORM)
        assert score["correct"] == "".join(str(int(margin > 0)) for margin in score["margins"])
    assert (tasks["boolq"]["version"], tasks["arc_easy"]["version"]) == (2.0, 1.0)
    average = result["average"]
    assert average["metric"] == "acc"
    assert set(average["tasks"]) == set(tasks)
    assert average["value"] == pytest.approx(sum(score["value"] for score in tasks.values()) / 14)
    squares = sum(score["stderr"] ** 2 for score in tasks.values())
    assert average["stderr"] == pytest.approx(math.sqrt(squares) / 14)
    assert result["perplexity"] is None


def test_scores_repeat_and_limit_takes_the_first_items(data_root):
    model = tiny()
    tasks = ["rte", "openbookqa"]
    once, twice = (evaluate(model, TOKENIZER, eval_cfg(tasks, data_root), None, progress=False) for _ in range(2))
    assert once == twice
    limited = evaluate(model, TOKENIZER, eval_cfg(tasks, data_root, limit=2), None, progress=False)
    assert [score["n"] for score in limited["tasks"].values()] == [2, 2]
    assert all(score["correct"] == once["tasks"][task]["correct"][:2] for task, score in limited["tasks"].items())
    single = evaluate(model, TOKENIZER, eval_cfg(["rte"], data_root, limit=1), None, progress=False)
    assert single["tasks"]["rte"]["stderr"] is None
    assert single["average"]["stderr"] is None


def test_accuracy_is_that_of_the_likeliest_answer(data_root):
    """rte by hand: a plain forward pass over prompt and answer, for both answers."""
    model = tiny()
    right, margins = "", []
    for row in items("rte"):
        prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
        scores = []
        for answer in (" True", " False"):
            ids = [1, *TOKENIZER.encode(prompt + answer, add_special_tokens=False)]
            start = 1 + len(TOKENIZER.encode(prompt, add_special_tokens=False))
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids))))
        right += str(int(scores.index(max(scores)) == row["label"]))
        margins.append(scores[row["label"]] - scores[1 - row["label"]])
    result = evaluate(model, TOKENIZER, eval_cfg(["rte"], data_root), None, progress=False)["tasks"]["rte"]
    assert result["correct"] == right and result["value"] == pytest.approx(right.count("1") / ITEMS)
    assert result["margins"] == pytest.approx(margins, abs=2e-4)
    assert result["margin"] == pytest.approx(statistics.mean(margins), abs=2e-4)
    assert result["margin_stderr"] == pytest.approx(statistics.stdev(margins) / math.sqrt(ITEMS), abs=2e-4)


def test_prompts_in_the_chat_template_of_the_model(data_root, monkeypatch):
    tokenizer = make_tokenizer()
    cfg = eval_cfg(["rte"], data_root, limit=1, chat_template=True)
    with pytest.raises(BadInput, match=r"eval.chat_template=true: the tokenizer of the model has no chat template"):
        check(cfg, tokenizer)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }} says {{ m.content }} {% endfor %}now"
    check(cfg, tokenizer)
    asked = []
    encode = PromptSharingLM.tok_encode
    monkeypatch.setattr(PromptSharingLM, "tok_encode", lambda self, text, **_: asked.append(text) or encode(self, text))
    evaluate(tiny(), tokenizer, cfg, None, progress=False)
    assert any(text.startswith("<s>user says") and text.endswith("now") for text in asked)
    assert encode(SimpleNamespace(tokenizer=tokenizer, add_bos_token=True), asked[-1]).count(1) == 1  # one BOS


def test_a_task_without_accuracy_has_its_first_metric_and_no_part_in_the_average(monkeypatch):
    scores = {
        "results": {"t": {"alias": "t", "f1,none": 0.5, "f1_stderr,none": "N/A", "em,none": 0.1}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
        "versions": {"t": 3.0},
    }
    score = evaluate_module._score(scores, "t", SimpleNamespace(OUTPUT_TYPE="generate_until"))
    assert score == {"metric": "f1", "value": 0.5, "stderr": None, "n": 4, "version": 3.0}
    other = {"metric": "acc", "value": 0.25, "stderr": 0.1}
    for tasks, averaged in (({"t": score, "u": other}, ["u"]), ({"t": score}, None)):
        monkeypatch.setattr(evaluate_module, "_zero_shot", lambda *_, tasks=tasks: tasks)
        average = evaluate(tiny(), TOKENIZER, eval_cfg(["t"]), None)["average"]
        assert (average and average["tasks"]) == averaged


def test_items_that_can_be_half_right_are_not_listed():
    samples = [{"doc_id": 1, "acc": 1.0}, {"doc_id": 0, "acc": False}, {"doc_id": 2, "f1": 0.5}]
    assert evaluate_module._correct(samples) == {"correct": "01"}
    assert evaluate_module._correct([{"doc_id": 0, "acc": 0.5}]) == {}


# ---- bad input


@pytest.mark.slow
def test_other_tasks_are_looked_up_in_lm_eval():
    assert refused(eval_cfg(["piqa"])).startswith("eval.tasks=piqa: cannot be loaded (Couldn't reach '")
    assert "runs the code of a metric from the Hub (code_eval)" in refused(eval_cfg(["humaneval"]))
    assert "unknown task 'no_such_task'" in refused(eval_cfg(["no_such_task"]))


FOUR = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("boolq", {"label": 7}, "label of row 2 of {file}: Input should be 0 or 1 (found 7)"),
        ("boolq", {"passage": None}, "passage of row 2 of {file}: Input should be a valid string (found None)"),
        ("hellaswag", {"label": "4"}, "must be the number of an ending, from 0 (found '4')"),
        ("hellaswag", {"label": ["1"]}, "must be the number of an ending, from 0 (found ['1'])"),
        ("hellaswag", {"endings": ["a"]}, "column endings of row 2 of {file}: List should have at least 2 items"),
        ("hellaswag", {"endings": ["a", " "]}, "column endings.1 of row 2 of {file}: String should match pattern"),
        ("hellaswag", {"endings": "abcd"}, "Input should be a valid list (found 'abcd')"),
        ("winogrande", {"answer": "3"}, "Input should be '1' or '2' (found '3')"),
        ("winogrande", {"sentence": "no gap"}, "String should match pattern '_' (found 'no gap')"),
        ("winogrande", {"option2": " "}, "String should match pattern '\\S' (found ' ')"),
        ("arc_easy", {"answerKey": "Z"}, "must be one of choices.label (found 'Z')"),
        ("arc_easy", {"answerKey": " A"}, "must be one of choices.label (found ' A')"),
        ("arc_easy", {"choices": FOUR | {"text": ["a", "b"]}}, "must have a label for each text, all different"),
        ("arc_easy", {"choices": FOUR | {"label": list("ABCC")}}, "must have a label for each text, all different"),
        ("arc_easy", {"choices": FOUR | {"more": 1}}, "column choices.more of row 2 of {file}: Extra inputs"),
        ("arc_easy", {"choices": ["a", "b"]}, "Input should be a valid dictionary"),
        ("openbookqa", {"answerKey": "E"}, "must be one of choices.label (found 'E')"),
        ("openbookqa", {"answerKey": 0}, "Input should be a valid string (found 0)"),
    ],
)
def test_an_item_that_its_task_cannot_read_is_named(tmp_path, task, changes, message):
    rows = items(task)
    file = write_rows(tmp_path / task / f"{ZERO_SHOT[task].split}.jsonl", [rows[0], rows[1] | changes, *rows[2:]])
    answer = refused(eval_cfg([task], tmp_path))
    assert answer.startswith("eval.data_root: column ") and message.format(file=file) in answer
    assert len(answer) < 400 + len(str(file))


def test_an_empty_file_and_a_missing_column_are_named(tmp_path):
    file = write_rows(tmp_path / "rte" / "validation.jsonl", [])
    assert refused(eval_cfg(["rte"], tmp_path)) == f"eval.data_root: {file} is empty"
    write_rows(file, [{"sentence1": "a", "label": 0}])
    assert refused(eval_cfg(["rte"], tmp_path)) == (
        f"eval.data_root: column sentence2 of row 1 of {file}: Field required (found {{'label': 0, 'sentence1': 'a'}})"
    )


# ---- tokens that the model does not know


def test_a_token_that_the_model_does_not_know_is_named(tmp_path):
    """A tokenizer with one token more, as an added padding token makes it; it matters where the token occurs."""
    grown, known = make_tokenizer(), VOCABULARY
    grown.add_tokens(["zebra"])
    assert len(grown) == known + 1
    cfg = eval_cfg(perplexity=text_cfg(tmp_path / "text.jsonl", 4))
    write_rows(tmp_path / "text.jsonl", [{"text": "the cat sees the dog"}])
    check(cfg, tokenizer=grown)
    write_rows(tmp_path / "text.jsonl", [{"text": "the zebra sees the dog"}])
    line = f"model.path: token {known} ('zebra') occurs in eval.perplexity.text; "
    assert refused(cfg, tokenizer=grown) == f"{line}the tokenizer has {known + 1} tokens, the model {known}"
    check(cfg, tokenizer=grown, vocabulary=known + 1)
    rows = items("rte")
    write_rows(tmp_path / "rte" / "validation.jsonl", [*rows[:4], rows[4] | {"sentence2": "a zebra"}])
    line = f"model.path: token {known} ('zebra') occurs in eval.tasks; "
    assert refused(eval_cfg(["rte"], tmp_path), tokenizer=grown).startswith(line)
    check(eval_cfg(["rte", "microworld_rte"], tmp_path, limit=4), tokenizer=grown)


# ---- before the training


def test_what_cannot_be_scored_fails_before_the_training(data_root, monkeypatch, caplog):
    """A few forward passes of a few tokens; a run that scores nothing needs none."""
    tasks, text = eval_cfg(["rte"], data_root), eval_cfg(perplexity=text_cfg("gone.txt", 8))
    model, tokens = tiny().train(), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: tokens.append(args[0].numel()))
    check_scoring(model, TOKENIZER, eval_cfg())
    assert not tokens
    for cfg in (tasks, text):
        check_scoring(model, TOKENIZER, cfg)
    assert model.training and 0 < sum(tokens) < 100
    assert not caplog.records

    def mute(*_, **__):
        raise NotImplementedError("no logits")

    monkeypatch.setattr(model, "forward", mute)
    for cfg in (tasks, text):
        with pytest.raises(NotImplementedError, match="no logits"):
            check_scoring(model, TOKENIZER, cfg)
