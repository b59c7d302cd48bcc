"""Scores of a model: prompts, averages, bad input; without a network and without a trace."""

import math
import os
import random
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama, make_tokenizer, sentence, write_rows

from lors import microworld
from lors.harness import evaluate as evaluate_module
from lors.harness.corpora import read_rows
from lors.harness.evaluate import MICROWORLD_TASKS, ZERO_SHOT, check_tasks, evaluate
from lors.harness.perplexity import perplexity_text
from lors.harness.validate import BadInput

TOKENIZER = make_tokenizer()
# A folder with real data sets, laid out as <name>/<split>.jsonl.
REAL = Path(os.environ.get("LORS_DATA_ROOT", "no-such-folder"))
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="LORS_DATA_ROOT names no folder")
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


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def eval_cfg(tasks=(), data_root=None, **fields):
    base = {"limit": None, "batch_size": 8, "add_bos_token": True, "perplexity": None}
    root = None if data_root is None else str(data_root)
    return SimpleNamespace(**(base | {"tasks": list(tasks), "data_root": root} | fields))


def text_cfg(source, window):
    return SimpleNamespace(text=str(source), window=window)


def tiny(**fields):
    return make_tiny_llama(vocab_size=len(TOKENIZER), initializer_range=0.3, **fields)


# ---- tasks


def prompts(tasks, data_root, folder, limit=None):
    """What lm-eval asks of a model: (prompt, answer) of each request, and each item's right answer."""
    asked, right = {}, {}
    with evaluate_module._lean_lm_eval():
        cfg = eval_cfg(tasks, data_root)
        manager = evaluate_module._task_manager(tuple(tasks))
        loaded = manager.load(evaluate_module._specifications(cfg, folder))["tasks"]
        for name, task in loaded.items():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=0)
            task.build_all_requests(limit=limit)
            asked[name] = [instance.args for instance in task.instances]
            right[name] = [
                task.doc_to_text(doc) if name.endswith("winogrande") else task.doc_to_target(doc)
                for doc in list(task.eval_docs)[:limit]
            ]
    return asked, right


def test_the_microworld_tasks_ask_exactly_what_the_stock_tasks_ask(world, data_root, tmp_path, no_network):
    stock = prompts(ZERO_SHOT, data_root, tmp_path)
    own = prompts(MICROWORLD_TASKS, None, tmp_path)
    for task in ZERO_SHOT:
        assert own[0][f"microworld_{task}"] == stock[0][task], task
        assert own[1][f"microworld_{task}"] == stock[1][task], task
    asked = stock[0]
    assert asked["boolq"][1] == (f"{items('boolq')[0]['passage']}\nQuestion: {sentence(3, 4)}?\nAnswer:", " yes")
    assert asked["rte"][0][1] == " True"
    assert asked["winogrande"][0][0].endswith("because the cat's")
    assert stock[1]["arc_easy"] == [0, 1, 2, 0, 1]


def test_the_items_of_the_microworld_fit_their_tasks(tmp_path):
    """The generated items have all columns that the prompts read; every position is right now and then."""
    count = 40
    asked, right = prompts(MICROWORLD_TASKS, None, tmp_path, limit=count)
    for name, task in MICROWORLD_TASKS.items():
        answers = 2 if task in ("boolq", "rte", "winogrande") else 4
        assert len(asked[name]) == answers * count
        assert {int(answer) for answer in right[name]} == set(range(answers))


# ---- scores


def test_scores_of_all_tasks_from_local_files(world, data_root, no_network):
    model = tiny().train()
    cfg = eval_cfg([*ZERO_SHOT, *MICROWORLD_TASKS], data_root)
    state = random.getstate(), torch.get_rng_state()
    pad_token = TOKENIZER.pad_token
    result = evaluate(model, TOKENIZER, cfg, progress=False)
    assert (random.getstate(), pad_token) == (state[0], TOKENIZER.pad_token)
    assert torch.equal(torch.get_rng_state(), state[1])
    assert model.training

    tasks = result["tasks"]
    assert set(tasks) == {*ZERO_SHOT, *MICROWORLD_TASKS}
    for task in ZERO_SHOT:
        score = tasks[task]
        assert {**tasks[f"microworld_{task}"], "version": None} == {**score, "version": None}
        assert (score["metric"], score["n"]) == ("acc", ITEMS)
        assert len(score["correct"]) == ITEMS and score["correct"].count("1") / ITEMS == pytest.approx(score["value"])
        assert score["stderr"] == pytest.approx(math.sqrt(score["value"] * (1 - score["value"]) / (ITEMS - 1)))
        assert ("acc_norm" in score) == (task in WITH_NORM)
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
    once, twice = (evaluate(model, TOKENIZER, eval_cfg(tasks, data_root), progress=False) for _ in range(2))
    assert once == twice
    limited = evaluate(model, TOKENIZER, eval_cfg(tasks, data_root, limit=2), progress=False)
    assert [score["n"] for score in limited["tasks"].values()] == [2, 2]
    assert all(score["correct"] == once["tasks"][task]["correct"][:2] for task, score in limited["tasks"].items())
    single = evaluate(model, TOKENIZER, eval_cfg(["rte"], data_root, limit=1), progress=False)
    assert single["tasks"]["rte"]["stderr"] is None
    assert single["average"]["stderr"] is None


def test_accuracy_is_that_of_the_likeliest_answer(data_root):
    """rte by hand: a plain forward pass over prompt and answer, for both answers."""
    model = tiny()
    right = ""
    for row in items("rte"):
        prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
        scores = []
        for answer in (" True", " False"):
            ids = [1, *TOKENIZER.encode(prompt + answer, add_special_tokens=False)]
            start = 1 + len(TOKENIZER.encode(prompt, add_special_tokens=False))
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids))))
        right += str(int(scores.index(max(scores)) == row["label"]))
    result = evaluate(model, TOKENIZER, eval_cfg(["rte"], data_root), progress=False)["tasks"]["rte"]
    assert result["correct"] == right and result["value"] == pytest.approx(right.count("1") / ITEMS)


def test_without_tasks_there_is_no_average():
    result = evaluate(tiny(), TOKENIZER, eval_cfg(), progress=False)
    assert result == {"tasks": {}, "average": None, "perplexity": None}


def test_a_task_without_accuracy_has_its_first_metric_and_no_part_in_the_average():
    scores = {
        "results": {"t": {"alias": "t", "f1,none": 0.5, "f1_stderr,none": "N/A", "em,none": 0.1}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
        "versions": {"t": 3.0},
    }
    score = evaluate_module._score(scores, "t")
    assert score == {"metric": "f1", "value": 0.5, "stderr": None, "n": 4, "version": 3.0}
    other = {"metric": "acc", "value": 0.25, "stderr": 0.1}
    assert evaluate_module._average({"t": score, "u": other})["tasks"] == ["u"]
    assert evaluate_module._average({"t": score}) is None


def test_items_that_can_be_half_right_are_not_listed():
    samples = [{"doc_id": 1, "acc": 1.0}, {"doc_id": 0, "acc": False}, {"doc_id": 2, "f1": 0.5}]
    assert evaluate_module._correct(samples) == {"correct": "01"}
    assert evaluate_module._correct([{"doc_id": 0, "acc": 0.5}]) == {}


# ---- perplexity


def test_perplexity_in_the_result_and_its_text(tmp_path, world):
    file = write_rows(tmp_path / "text.jsonl", [{"text": sentence(i)} for i in range(9)])
    assert perplexity_text(str(file)) == "\n\n".join(sentence(i) for i in range(9))
    cfg = eval_cfg(perplexity=text_cfg(file, 32))
    result = evaluate(tiny(), TOKENIZER, cfg, progress=False)["perplexity"]
    assert result["text"] == str(file)
    assert 1 < result["value"] < 1e6
    pages = [{"page": " = A = \n \n One . "}, {"page": " = B = \n \n"}]
    write_rows(tmp_path / "wikitext" / "test.jsonl", pages)
    rows = ["", " = A = \n", "", " One . \n", " = B = \n", ""]
    assert perplexity_text("wikitext", str(tmp_path)) == "\n\n".join(rows)


# ---- bad input


def test_good_configs_pass_the_check(data_root, world):
    check_tasks(eval_cfg([*ZERO_SHOT, *MICROWORLD_TASKS], data_root))
    check_tasks(eval_cfg(ZERO_SHOT, perplexity=text_cfg("wikitext", 8)))  # from the Hub: not looked at


def test_an_unknown_task_is_named(monkeypatch):
    monkeypatch.setattr(evaluate_module, "_task_manager", lambda tasks: SimpleNamespace(task_index={"piqa": 1}))
    check_tasks(eval_cfg(["piqa", "boolq"]))
    with pytest.raises(BadInput, match=r"eval.tasks: unknown task 'bolq'; must be a task of lm-eval, or one of micro"):
        check_tasks(eval_cfg(["piqa", "bolq"]))


@pytest.mark.slow
def test_other_tasks_are_looked_up_in_lm_eval():
    check_tasks(eval_cfg(["piqa"]))
    with pytest.raises(BadInput, match="unknown task 'no_such_task'"):
        check_tasks(eval_cfg(["no_such_task"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file"),
        ("", r"validation.jsonl is empty"),
        ('{"sentence1": "a", "sentence2": "b", "label": 0}\n{"sentence1": ', r"validation.jsonl:2: not valid JSON"),
        ('{"sentence1": "a", "label": 0}\n', r"row 1 of .*validation.jsonl has no column 'sentence2'"),
    ],
)
def test_a_bad_file_in_the_data_root_is_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "rte").mkdir()
        (tmp_path / "rte" / "validation.jsonl").write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        check_tasks(eval_cfg(["rte"], tmp_path))
    assert str(caught.value).startswith("eval.data_root")


def test_missing_folders_and_texts_are_named(tmp_path):
    with pytest.raises(BadInput, match=r"eval.data_root=/no/such/folder: no such folder"):
        check_tasks(eval_cfg(["rte"], "/no/such/folder"))
    with pytest.raises(BadInput, match=r"eval.perplexity.text=gone.txt: no such file"):
        check_tasks(eval_cfg(perplexity=text_cfg("gone.txt", 8)))
    with pytest.raises(BadInput, match=r"eval.perplexity.text=.*wikitext/test.jsonl: no such file"):
        check_tasks(eval_cfg(data_root=tmp_path, perplexity=text_cfg("wikitext", 8)))


# ---- real data


@needs_real_data
def test_the_seven_real_sets_are_scored_from_a_folder(no_network):
    check_tasks(eval_cfg(ZERO_SHOT, REAL, perplexity=text_cfg("wikitext", 2048)))
    model = tiny(max_position_embeddings=2048)
    result = evaluate(model, TOKENIZER, eval_cfg(ZERO_SHOT, REAL, limit=3), progress=False)
    assert [score["n"] for score in result["tasks"].values()] == [3] * 7
    assert len(list(read_rows(str(REAL / "arc_easy" / "test.jsonl")))) == 2376
