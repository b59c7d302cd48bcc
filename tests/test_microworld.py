"""The embedded world: items are held out, trivial strategies score at chance, everything is a function of the seed."""

import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import microworld
from harness.alpaca import alpaca_prompt
from harness.microworld.corpus import documents, split_of
from harness.microworld.questions import QUESTIONS, as_prompt_and_answer, training_draw
from harness.microworld.tokenizer import train_tokenizer
from harness.microworld.world import build
from harness.pretraining import __main__ as pretrain

CHANCE = {"boolq": 1 / 2, "rte": 1 / 2, "winogrande": 1 / 2}  # the others have four choices


def choices_and_gold(task: str, row: dict) -> tuple[list[str], int]:
    if task == "boolq":
        return ["no", "yes"], row["label"]
    if task == "rte":
        return ["True", "False"], row["label"]
    if task == "hellaswag":
        return row["endings"], int(row["label"])
    if task == "winogrande":
        return [row["option1"], row["option2"]], int(row["answer"]) - 1
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])


def what_is_asked(task: str, row: dict) -> str:
    """The shortest text that would give the item away if a training document contained it."""
    prompt, answer = as_prompt_and_answer(task, row)
    if task in ("boolq", "rte"):
        return prompt.split("\n")[1]
    if task == "winogrande":
        return f"{prompt} {answer}"
    return prompt


@pytest.mark.parametrize("task", microworld.TASKS)
def test_at_least_five_hundred_distinct_items(task):
    rows = microworld.task_rows(task)
    assert len(rows) >= 500
    assert len({as_prompt_and_answer(task, row)[0] for row in rows}) == len(rows)
    for row in rows:
        choices, gold = choices_and_gold(task, row)
        assert len(set(choices)) == len(choices) and 0 <= gold < len(choices)


@pytest.fixture(scope="module")
def training_text() -> str:
    rows = microworld.instruction_rows()
    return "\n".join(
        itertools.chain(
            *(microworld.texts(split) for split in ("pretrain", "calibration", "heldout")),
            (alpaca_prompt(row["instruction"], row["input"]) + row["output"] for row in rows),
        )
    )


@pytest.mark.parametrize("task", microworld.TASKS)
def test_no_item_occurs_in_a_training_split(task, training_text):
    assert not [row for row in microworld.task_rows(task) if what_is_asked(task, row) in training_text]


@pytest.mark.parametrize("task", microworld.TASKS)
def test_the_training_side_never_asks_a_test_question(task):
    asked = {what_is_asked(task, row) for row in microworld.task_rows(task)}
    world, rng = build(), random.Random(7)
    assert not asked & {what_is_asked(task, training_draw(task, world, rng)) for _ in range(2000)}


@pytest.mark.parametrize("task", microworld.TASKS)
@pytest.mark.parametrize("strategy", ["first", "last", "longest", "shortest"])
def test_trivial_strategies_score_at_chance(task, strategy):
    pick = {
        "first": lambda choices: 0,
        "last": lambda choices: len(choices) - 1,
        "longest": lambda choices: max(range(len(choices)), key=lambda i: len(choices[i])),
        "shortest": lambda choices: min(range(len(choices)), key=lambda i: len(choices[i])),
    }[strategy]
    items = [choices_and_gold(task, row) for row in microworld.task_rows(task)]
    chance = CHANCE.get(task, 1 / 4)
    score = sum(pick(choices) == gold for choices, gold in items) / len(items)
    assert abs(score - chance) < 3.5 * math.sqrt(chance * (1 - chance) / len(items))


@pytest.mark.parametrize("task", microworld.TASKS)
def test_items_have_the_columns_of_the_real_sets(task):
    columns = {
        "boolq": {"question", "passage", "label"},
        "rte": {"sentence1", "sentence2", "label"},
        "hellaswag": {"activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"},
        "winogrande": {"sentence", "option1", "option2", "answer"},
        "arc_easy": {"question", "choices", "answerKey"},
        "arc_challenge": {"question", "choices", "answerKey"},
        "openbookqa": {"question_stem", "choices", "answerKey"},
    }[task]
    assert all(set(row) == columns | {"idx"} for row in microworld.task_rows(task))
    json.dumps(microworld.task_rows(task))


def test_splits_are_disjoint_and_seeded():
    seen = {split: list(itertools.islice(documents(split), 50)) for split in microworld.TEXTS_PER_SPLIT}
    for split, texts in seen.items():
        assert {split_of(text) for text in texts} == {split}
        assert texts == list(itertools.islice(documents(split), 50))
    assert seen["pretrain"] != list(itertools.islice(documents("pretrain", seed=1), 50))
    assert not set(seen["pretrain"]) & set(seen["heldout"])


def test_validation_items_ask_what_no_test_item_asks():
    rows = microworld.task_rows("arc_easy", "validation")
    asked = {what_is_asked("arc_easy", row) for row in rows}
    assert len(asked) == len(rows) == microworld.VALIDATION_ITEMS_PER_TASK
    assert not asked & {what_is_asked("arc_easy", row) for row in microworld.task_rows("arc_easy")}


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="split='train2'"):
        microworld.texts("train2")
    with pytest.raises(ValueError, match="task='piqa'"):
        microworld.task_rows("piqa")


def test_every_question_has_a_stock_wording():
    world, rng = build(), random.Random(3)
    for task in QUESTIONS:
        prompt, answer = as_prompt_and_answer(task, training_draw(task, world, rng))
        assert prompt == prompt.strip() and answer == answer.strip() and answer


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_can_be_encoded(text):
    tokenizer = small_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def small_tokenizer(cache=[]):  # noqa: B006 (built once for all examples)
    if not cache:
        cache.append(train_tokenizer(microworld.texts("pretrain")[:500], vocabulary=400))
    return cache[0]


@pytest.mark.slow
def test_an_interrupted_pretraining_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "CHUNK", 2)
    monkeypatch.setattr(pretrain, "BATCH", 2)
    monkeypatch.setattr(pretrain, "LENGTH", 16)
    whole, _, log = pretrain.train(tmp_path / "whole", steps=4, seed=0, compiled=False)

    write, calls = pretrain._write, []

    def die_after_first_state(path, state):
        write(path, state)
        calls.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "_write", die_after_first_state)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(tmp_path / "killed", steps=4, seed=0, compiled=False)
    monkeypatch.setattr(pretrain, "_write", write)
    resumed, _, resumed_log = pretrain.train(tmp_path / "killed", steps=4, seed=0, compiled=False)
    assert len(calls) == 1 and len(log) == len(resumed_log) == 2
    for name, weight in whole.state_dict().items():
        assert weight.equal(resumed.state_dict()[name]), name
