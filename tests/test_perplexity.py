"""Perplexity of a text and of held-out answers: what is read, and the numbers against plain forward passes."""

import math
import statistics

import pytest
import torch
from conftest import sentence, write_rows
from test_evaluate import TOKENIZER, eval_cfg, text_cfg, tiny

from harness.data import IGNORED
from harness.errors import BadInput
from harness.evaluate import evaluate
from harness.perplexity import perplexity, perplexity_windows


def windows_of(text, folder, window, add_bos_token=True):
    (folder / "text.txt").write_text(text)
    cfg = eval_cfg(perplexity=text_cfg(folder / "text.txt", window), add_bos_token=add_bos_token)
    return perplexity_windows(TOKENIZER, cfg)


def text_of(cfg):
    """The text of the windows, without BOS."""
    return TOKENIZER.decode(perplexity_windows(TOKENIZER, cfg).flatten()[1:])


def test_perplexity_in_the_result_and_its_text(tmp_path):
    file = write_rows(tmp_path / "text.jsonl", [{"text": sentence(i)} for i in range(9)])
    cfg = eval_cfg(perplexity=text_cfg(file, 32))
    assert text_of(cfg).startswith("\n\n".join(sentence(i) for i in range(3)))
    windows = perplexity_windows(TOKENIZER, cfg)
    result = evaluate(tiny(), TOKENIZER, cfg, windows, progress=False)["perplexity"]
    assert result["text"] == str(file)
    assert 1 < result["value"] < 1e6
    assert len(perplexity_windows(TOKENIZER, eval_cfg(perplexity=text_cfg(file, 32, windows=1)))) == 1 < len(windows)
    pages = [{"page": " = A = \n \n One . "}, {"page": " = B = \n \n"}]
    write_rows(tmp_path / "wikitext" / "test.jsonl", pages)
    rows = ["", " = A = \n", "", " One . \n", " = B = \n", ""]
    cfg = eval_cfg(perplexity=text_cfg("wikitext", 4), data_root=tmp_path)
    assert "\n\n".join(rows).startswith(text_of(cfg)) and len(text_of(cfg)) > 20


def test_perplexity_of_answers_counts_every_target_once():
    """Against one row at a time; a row of one target has the weight of one target."""
    model = tiny()
    ids = [[1, 5, 6, 7, 8, 9], [1, 4, 4], [1, 9, 8, 7]]
    rows = [{"input_ids": row, "labels": [IGNORED] * 2 + row[2:]} for row in ids]
    means = []
    for row in ids:
        logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
        means.append(-statistics.mean(logits[i - 1, row[i]].item() for i in range(2, len(row))))
    result = evaluate(model, TOKENIZER, eval_cfg(), None, rows, progress=False)["held_out"]
    assert result["losses"] == pytest.approx(means, abs=1e-5)
    assert (result["targets"], result["rows"], result["tokens"]) == ([4, 1, 2], 3, 7)
    mean = (4 * means[0] + means[1] + 2 * means[2]) / 7
    assert result["loss"] == pytest.approx(mean) and result["value"] == pytest.approx(math.exp(mean))
    residuals = [count * (loss - mean) for count, loss in zip((4, 1, 2), means, strict=True)]
    assert result["loss_stderr"] == pytest.approx(math.sqrt(3 / 2 * sum(x * x for x in residuals)) / 7, rel=1e-4)


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_perplexity_is_the_exponential_of_the_mean_of_window_means(tmp_path, add_bos_token):
    model = tiny()
    text = " ".join(sentence(i) for i in range(20))
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    ids = [1, *ids] if add_bos_token else ids
    means = []
    for start in range(0, len(ids) // 16 * 16, 16):
        window = torch.tensor(ids[start : start + 16])
        logits = model(window[None]).logits[0].log_softmax(-1)
        means.append(-sum(logits[i, window[i + 1]].item() for i in range(15)) / 15)
    result = perplexity(model, windows_of(text, tmp_path, 16, add_bos_token), progress=False)
    assert result["value"] == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-5)
    assert result["loss"] == pytest.approx(sum(means) / len(means), rel=1e-6)
    spread = torch.tensor(means).std().item() / math.sqrt(len(means))
    assert result["loss_stderr"] == pytest.approx(spread, rel=1e-4)
    assert result["losses"] == pytest.approx(means, abs=1e-5)
    assert (result["window"], result["windows"], result["tokens"]) == (16, len(means), 15 * len(means))


def test_a_text_shorter_than_a_window_is_an_error(tmp_path):
    with pytest.raises(BadInput, match=r"eval.perplexity.window=100: must be at most 3, the tokens of the text"):
        windows_of("the cat", tmp_path, 100)
