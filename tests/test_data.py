"""Reading text and instructions, the template, tokenised rows, batches, calibration samples."""

import json
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer, sentence, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness import data as data_module
from harness.corpora import read_rows, texts, wikitext_rows
from harness.data import IGNORED, calibration_tokens, collator, held_out_rows, random_data, tokenised_rows
from harness.errors import BadInput

TOKENIZER = make_tokenizer()
BOS, EOS, PAD = 1, 2, 0
PREAMBLE = "Below is an instruction that describes a task"
WITH_INPUT = (
    PREAMBLE + ", paired with an input that provides further context. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
)
WITHOUT_INPUT = (
    PREAMBLE + ". Write a response that appropriately completes the request.\n\n### Instruction:\nSing."
    "\n\n### Response:\n"
)


def data_cfg(path, **fields):
    base = {"kind": "instruction", "path": str(path), "split": "train", "limit": None}
    return SimpleNamespace(**(base | {"template": "alpaca", "loss_on": "all"} | fields))


def train_cfg(**fields):
    base = {"sequence_length": 512, "steps": 3, "batch_size": 2, "gradient_accumulation": 2}
    return SimpleNamespace(**(base | fields))


def prune_cfg(path, samples, length):
    return SimpleNamespace(samples=samples, sequence_length=length, text=str(path))


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@pytest.fixture
def instructions(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "It is 3."},
        {"instruction": "Sing.", "input": "", "output": "La la."},
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


# ---- instruction rows


def test_rows_are_the_alpaca_template_between_bos_and_eos(instructions):
    rows = tokenised_rows(data_cfg(instructions), train_cfg(), TOKENIZER)
    found = {decode(row["input_ids"]) for row in rows}
    assert found == {f"<s>{WITH_INPUT}It is 3.</s>", f"<s>{WITHOUT_INPUT}La la.</s>"}
    for row in rows:
        assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_held_out_rows_follow_those_that_are_trained_on(tmp_path):
    rows = [{"instruction": "Say.", "input": "", "output": f"It is {i}."} for i in range(5)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = {"data": vars(data_cfg(file, limit=2)), "train": vars(train_cfg()), "eval": {"held_out": 3}}
    cfg = OmegaConf.create(cfg | {"cache_root": str(tmp_path)})
    fingerprinted = {"data": {"path": "sha256:1"}, "model": {"path": "m", "revision": None}}
    for _ in range(2):  # made, then from the cache
        found = held_out_rows(cfg, fingerprinted, TOKENIZER, len(TOKENIZER))
        answers = [decode([t for t in row["labels"] if t != IGNORED]) for row in found]
        assert answers == [f"It is {i}.</s>" for i in (2, 3, 4)]
    cfg.eval.held_out = 4
    with pytest.raises(BadInput, match=r"eval.held_out=4: the data has 5 rows, 2 of them to train on"):
        held_out_rows(cfg, fingerprinted, TOKENIZER, len(TOKENIZER))
    cfg.data.limit = None
    with pytest.raises(BadInput, match=r"eval.held_out=4: needs instructions and a data.limit"):
        held_out_rows(cfg, fingerprinted, TOKENIZER, len(TOKENIZER))


def test_loss_on_the_answer_alone(instructions):
    rows = tokenised_rows(data_cfg(instructions, loss_on="answer"), train_cfg(), TOKENIZER)
    assert {decode([t for t in row["labels"] if t != IGNORED]) for row in rows} == {"It is 3.</s>", "La la.</s>"}


def test_loss_on_the_answer_needs_a_tokenizer_that_says_where_it_begins(instructions, monkeypatch):
    monkeypatch.setattr(type(TOKENIZER), "is_fast", False)
    with pytest.raises(BadInput, match=r"data.loss_on=answer: this tokenizer reports no .* offsets; must be all"):
        tokenised_rows(data_cfg(instructions, loss_on="answer"), train_cfg(), TOKENIZER)


CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<s>assistant: {% endif %}"


def test_the_chat_template_takes_the_place_of_prompt_and_special_tokens(instructions, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", CHAT)
    rows = tokenised_rows(data_cfg(instructions, template="chat"), train_cfg(), TOKENIZER)
    questions = ["<s>user: Add.\n\n1 and 2</s>", "<s>user: Sing.</s>"]
    answers = ["It is 3.</s>", "La la.</s>"]
    assert [decode(row["input_ids"]) for row in rows] == [
        f"{question}<s>assistant: {answer}" for question, answer in zip(questions, answers, strict=True)
    ]
    rows = tokenised_rows(data_cfg(instructions, template="chat", loss_on="answer"), train_cfg(), TOKENIZER)
    assert [decode([t for t in row["labels"] if t != IGNORED]) for row in rows] == answers


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_word_problems_in_the_columns_of_gsm8k_read_as_lm_eval_asks_them(tmp_path, loss_on):
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "one and one?", "answer": "two"}])
    (row,) = tokenised_rows(data_cfg(file, template="question", loss_on=loss_on), train_cfg(), TOKENIZER)
    assert decode(row["input_ids"]) == "<s>Question: one and one?\nAnswer: two</s>"
    learnt = decode([t for t in row["labels"] if t != IGNORED])
    assert learnt == (" two</s>" if loss_on == "answer" else "Question: one and one?\nAnswer: two</s>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no') }}", "the template of the model fails"),
        (CHAT.replace("assistant: {% endif", "assistant: <think>{% endif"), "does not begin an answer"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_named(instructions, monkeypatch, template, said):
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    with pytest.raises(BadInput, match=f"data.template=chat: .*{said}"):
        tokenised_rows(data_cfg(instructions, template="chat"), train_cfg(), TOKENIZER)


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_every_character_of_any_answer_is_a_target_and_the_prompt_is_none(instruction, answer):
    pair = (f"### Instruction:\n{instruction}\n\n### Response:\n", answer)
    (row,) = data_module._encode_rows([pair], TOKENIZER, "answer", 10_000)
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    assert row["labels"][first:] == row["input_ids"][first:]
    # A byte-level token may hold only part of a character, so the split is compared in bytes.
    prompt = decode(row["input_ids"][1:first]).encode().rstrip("\N{REPLACEMENT CHARACTER}".encode())
    assert pair[0].encode().startswith(prompt)
    assert len(prompt) >= len(pair[0].encode()) - 8


def test_a_row_that_is_cut_has_no_eos(instructions):
    full = tokenised_rows(data_cfg(instructions), train_cfg(), TOKENIZER)
    longest = max(len(row["input_ids"]) for row in full)
    exact = tokenised_rows(data_cfg(instructions), train_cfg(sequence_length=longest), TOKENIZER)
    cut = tokenised_rows(data_cfg(instructions), train_cfg(sequence_length=longest - 1), TOKENIZER)
    assert exact == full
    for before, after in zip(full, cut, strict=True):
        kept = longest - 1
        assert after == {name: ids[:kept] for name, ids in before.items()}
    assert sum(row["input_ids"][-1] == EOS for row in cut) == 1


def test_rows_whose_answer_does_not_fit_are_dropped_with_a_warning(tmp_path, caplog):
    rows = [
        {"instruction": "x" * 400, "output": "never seen"},
        {"instruction": "short", "output": "seen"},
    ]
    cfg = data_cfg(write_rows(tmp_path / "rows.jsonl", rows), loss_on="answer")
    (row,) = tokenised_rows(cfg, train_cfg(sequence_length=300), TOKENIZER)
    assert "short" in decode(row["input_ids"])
    assert "1 of 2 rows dropped" in caplog.text


def test_limit_takes_the_first_rows(tmp_path):
    rows = [{"instruction": sentence(i), "output": str(i)} for i in range(12)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    limited = tokenised_rows(data_cfg(file, limit=3), train_cfg(), TOKENIZER)
    assert {decode(row["input_ids"])[-5:-4] for row in limited} == {"0", "1", "2"}


# ---- bad input

GOOD = '{"instruction": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '\n{"instruction": oops}\n', r"rows.jsonl:3: not valid JSON \(expected value at column 17\)"),
        (GOOD + '["a"]\n', r"rows.jsonl: line or entry 2 must be a JSON object, not list"),
        ('[{"instruction": "a",\n "output": }]', r"rows.jsonl: not valid JSON \(expected value at line 2 column 12\)"),
        ('[{"instruction": "a", "output": "b"}, 7]', r"line or entry 2 must be a JSON object, not int"),
        (
            '{"instruction": "a", "out\\nput": "b"}\n',
            r"column 'output' of row 1 must be text, not None .*'instruction', 'out.nput'",
        ),
        ('{"instruction": "a", "output": ' + "9" * 4_000 + "}", r"column 'output' of row 1 must be text, not 999"),
        ("[]", r"no row to train on; the data set is empty"),
        (b"\xff\xfe{}", r"cannot be read \('utf-8' codec can't decode byte 0xff in position 0"),
        (GOOD + '{"output": "\\ud800"}', r"rows.jsonl:2: not valid JSON \(unexpected end of hex escape at column 19\)"),
        (
            GOOD + '{"output": ' + "[" * 9_000,
            r"rows.jsonl:2: not valid JSON \(recursion limit exceeded at",
        ),
        (
            GOOD + '{"a": 1, "a": 2}',
            r"rows.jsonl:2: not valid JSON \(an object with a name twice, among",
        ),
        (GOOD + '{"n": NaN}', r"rows.jsonl:2: not valid JSON \(expected value at column 7\)"),
        (GOOD + '{"n": ' + "9" * 10_000 + "}", r"rows.jsonl:2: not valid JSON \(number out of range at column 4308\)"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_file_is_one_clear_line(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message) as caught:
        tokenised_rows(data_cfg(file), train_cfg(), TOKENIZER)
    assert str(caught.value).startswith("data.path")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "\\ud83d\\ude00 \\\\ud800"}')
    assert list(texts(str(file))) == ["\N{GRINNING FACE} \\ud800"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/file.jsonl", "data.path=no/such/file.jsonl: no such file"),
        ("~nobody/rows.json", "data.path=~nobody/rows.json: no such file"),
        ("/" + "x" * 300 + ".json", "data.path=/" + "x" * 300 + ".json: no such file"),
        (
            "nobody/nothing:part",
            "data.path=nobody/nothing:part: no such file, and the data set on the Hub cannot be read",
        ),
        ("not a name", "data.path=not a name: no such file, and the data set on the Hub cannot be read"),
    ],
)
def test_a_missing_source_is_one_clear_line(path, message):
    with pytest.raises(BadInput) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("read", [read_rows, texts])
def test_what_is_no_readable_file_is_one_clear_line(tmp_path, read):
    """A pipe that nobody writes to and a device without an end would be read for ever."""
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    messages = {
        tmp_path / "folder.json": "must be a regular file",
        tmp_path / "pipe.jsonl": "must be a regular file",
        tmp_path / "loop.jsonl": "no such file",
        "/dev/zero": "must be a regular file",
    }
    if Path("/proc/self/mem").is_file():
        messages["/proc/self/mem"] = "cannot be read ([Errno 5] Input/output error)"
    for path, message in messages.items():
        with pytest.raises(BadInput) as caught:
            list(read(str(path)))
        assert str(caught.value) == f"data.path={path}: {message}"


def test_a_binary_file_is_no_text(tmp_path):
    (tmp_path / "null.txt").write_text("a\0b")
    (tmp_path / "image.md").write_bytes(b"\x89PNG")
    with pytest.raises(BadInput, match=r"data.path=.*null.txt: not text \(it holds a null character\)"):
        list(texts(str(tmp_path / "null.txt")))
    with pytest.raises(BadInput, match=r"data.path=.*image.md: cannot be read"):
        list(texts(str(tmp_path / "image.md")))


def test_json_list_json_lines_blank_lines_and_byte_order_mark_read_alike(tmp_path):
    rows = [{"text": "eins"}, {"text": "zwei äöü"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    forms = {
        "list.json": json.dumps(rows, indent=1),
        "late.json": "\n \n" + json.dumps(rows),
        "lines.jsonl": "\n" + lines.replace("\n", "\n\n") + "\n",
        "mark.jsonl": "\N{ZERO WIDTH NO-BREAK SPACE}" + lines,
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert list(read_rows(str(tmp_path / name))) == rows, name
    assert list(read_rows(str(tmp_path / "lines.jsonl"), limit=1)) == rows[:1]


# ---- text and batches


def test_texts_from_columns_and_plain_files(tmp_path):
    assert list(texts(str(write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"page": "two"}])))) == ["one", "two"]
    (tmp_path / "b.txt").write_text("three\n\nfour")
    assert list(texts(str(tmp_path / "b.txt"))) == ["three\n\nfour"]
    with pytest.raises(BadInput, match=r"column 'text' of row 1 must be text, not None \(the row has \['body'"):
        list(texts(str(write_rows(tmp_path / "c.jsonl", [{"body": "x"}]))))


def test_text_becomes_blocks_of_the_joined_documents(tmp_path):
    documents = [sentence(i, 11) for i in range(9)]
    file = write_rows(tmp_path / "text.jsonl", [{"text": t} for t in [*documents, "  "]])
    # The BOS of the first document is the one in front of the first block.
    stream = [t for d in documents for t in [BOS, *TOKENIZER.encode(d, add_special_tokens=False), EOS]][1:]
    cfg = data_cfg(file, kind="text")
    rows = tokenised_rows(cfg, train_cfg(steps=None, sequence_length=8), TOKENIZER)
    expected = [[BOS, *stream[i : i + 7]] for i in range(0, len(stream) // 7 * 7, 7)]
    assert sorted(row["input_ids"] for row in rows) == sorted(expected)
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in rows)


def test_no_more_text_is_read_than_the_steps_need(monkeypatch):
    read = []

    def endless(*_, **__):
        while True:
            read.append(sentence(len(read), 30))
            yield read[-1]

    monkeypatch.setattr(data_module, "texts", endless)
    rows = tokenised_rows(data_cfg("x", kind="text"), train_cfg(sequence_length=10), TOKENIZER)
    assert len(rows) == 3 * 2 * 2
    assert len(read) <= data_module.ENCODED_AT_ONCE


def test_batches_are_padded_on_the_right_masked_and_ignored_there():
    rows = [{"input_ids": [BOS, 5, 6], "labels": [IGNORED, IGNORED, 6]}, {"input_ids": [BOS], "labels": [IGNORED]}]
    for side in ("right", "left"):  # whatever the tokenizer's own default
        tokenizer = make_tokenizer()
        tokenizer.padding_side = side
        batch = collator(tokenizer, "longest", 5)(rows)
        assert batch["input_ids"].tolist() == [[BOS, 5, 6], [BOS, PAD, PAD]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["labels"].tolist() == [[IGNORED, IGNORED, 6], [IGNORED, IGNORED, IGNORED]]
        assert tokenizer.padding_side == side
    fixed = collator(TOKENIZER, "fixed", 5)(rows)
    assert all(tensor.shape == (2, 5) and tensor.dtype == torch.int64 for tensor in fixed.values())
    assert all(torch.equal(fixed[name][:, :3], batch[name]) for name in batch)
    assert not fixed["attention_mask"][:, 3:].any()
    assert (fixed["labels"][:, 3:] == IGNORED).all()


# ---- calibration


@pytest.fixture
def corpus(tmp_path):
    return write_rows(tmp_path / "text.jsonl", [{"text": sentence(i, 12)} for i in range(40)])


def test_calibration_samples_start_with_bos_and_do_not_overlap(corpus):
    tokens = calibration_tokens(prune_cfg(corpus, 6, 9), TOKENIZER, seed=3)
    assert tokens.shape == (6, 9)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == BOS).all()
    # Together they are one running text: documents shuffled, each between BOS and EOS.
    joined = decode(tokens[:, 1:].flatten().tolist()).split("</s><s>")
    documents = {sentence(i, 12) for i in range(40)}
    assert len(joined) > 2
    assert set(joined[:-1]) <= documents


def test_the_seed_draws_the_calibration_samples(corpus):
    draw = [calibration_tokens(prune_cfg(corpus, 6, 9), TOKENIZER, seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_a_small_corpus_gives_samples_that_overlap_evenly(corpus, caplog):
    tokens = calibration_tokens(prune_cfg(corpus, 50, 100), TOKENIZER, seed=0)
    documents = [TOKENIZER.encode(sentence(i, 12), add_special_tokens=False) for i in range(40)]
    length = sum(map(len, documents)) + 2 * 40 - 1
    assert length < 50 * 99
    assert "samples of 100 overlap" in caplog.text
    assert tokens.shape == (50, 100)
    assert len({tuple(row) for row in tokens.tolist()}) == 50
    steps = [round(i * (length - 99) / 49) for i in range(50)]
    for (a, b), (start, following) in zip(pairwise(tokens), pairwise(steps), strict=True):
        assert torch.equal(a[1 + following - start :], b[1 : 100 - (following - start)])


def test_random_data_fills_every_step_and_is_seeded():
    cfg = train_cfg(sequence_length=7)
    rows = random_data(50, cfg, seed=0)
    assert len(rows) == 12
    assert all(len(row["input_ids"]) == 7 and row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in rows)
    assert {t for row in rows for t in row["input_ids"]} <= set(range(50))
    assert rows == random_data(50, cfg, seed=0) != random_data(50, cfg, seed=1)


def test_wikitext_rows_are_lines_and_blank_lines_are_empty():
    pages = [" = A = \n \n First line . \n ", " = B = \n \n Second . \n \n"]
    rows = wikitext_rows(pages)
    assert rows == ["", " = A = \n", "", " First line . \n", "", " = B = \n", "", " Second . \n", ""]
