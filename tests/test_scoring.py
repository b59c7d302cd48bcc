"""Log-likelihoods against the stock harness and against plain forward passes; perplexity by its definition."""

import math

import pytest
import torch
from conftest import make_tiny_llama, make_tokenizer, sentence
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from lors.harness.perplexity import perplexity
from lors.harness.scoring import PromptSharingLM
from lors.harness.validate import BadInput

TOKENIZER = make_tokenizer()


def tiny():
    return make_tiny_llama(vocab_size=len(TOKENIZER), initializer_range=0.3)


# ---- log-likelihoods


SMALL = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 48},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"intermediate_size": 48},
}
QUESTIONS = [
    *[(sentence(i, 8 + i % 3), f" {sentence(i + k, 1 + k)}") for i in range(7) for k in range(4)],
    *[(sentence(9), answer) for answer in (" a", " b", " c")],
    ("", sentence(2, 3)),
    (sentence(1, 4) + "  ", "red"),
    (sentence(3, 150), " the old tree"),  # longer than the model: the beginning is cut off
]


def ask(lm):
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=question, idx=0) for question in QUESTIONS]
    return lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sharing_prompts_changes_no_log_likelihood(kind):
    torch.manual_seed(0)
    shape = AutoConfig.for_model(kind, **SMALL, **ARCHITECTURES[kind], initializer_range=0.3, init_std=0.3)
    model = AutoModelForCausalLM.from_config(shape).eval()
    stock = ask(HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=4, add_bos_token=True))
    own = ask(PromptSharingLM(model, make_tokenizer(), batch_size=4, add_bos_token=True, progress=False))
    assert max(abs(score) for score, _ in stock) > 20
    assert [score for score, _ in own] == pytest.approx([score for score, _ in stock], abs=2e-4)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in stock]


def test_the_greedy_flag_is_set_where_it_should_be():
    model = tiny()
    prompt = [1, *TOKENIZER.encode(sentence(0), add_special_tokens=False)]
    continuation = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    ids = continuation[0, len(prompt) :].tolist()
    lm = PromptSharingLM(model, TOKENIZER, batch_size=8, add_bos_token=True, progress=False)
    wrong = [*ids[:2], (ids[2] + 1) % len(TOKENIZER)]
    answers = lm._loglikelihood_tokens([(None, prompt, ids), (None, prompt, ids[:1]), (None, prompt, wrong)])
    assert [greedy for _, greedy in answers] == [True, True, False]


def test_the_batch_size_bounds_the_rows_and_does_not_change_the_scores():
    model = tiny()
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    lms = [PromptSharingLM(model, TOKENIZER, batch_size=n, add_bos_token=True, progress=False) for n in (1, 5, 64)]
    scores = []
    for lm in lms:
        rows.clear()
        scores.append([score for score, _ in ask(lm)])
        assert max(rows) <= max(lm.batch_size, 4)  # the answers to one prompt stay together
    hook.remove()
    assert scores[0] == pytest.approx(scores[1], abs=2e-4)
    assert scores[0] == pytest.approx(scores[2], abs=2e-4)


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_bos_is_there_exactly_when_it_is_asked_for(add_bos_token):
    """Whatever the tokenizer would do by itself: this one puts BOS in front."""
    assert TOKENIZER.encode("a")[0] == 1
    lm = PromptSharingLM(tiny(), TOKENIZER, batch_size=8, add_bos_token=add_bos_token, progress=False)
    prompt, answer = lm._encode_pair("the cat", " sees")
    plain = TOKENIZER.encode("the cat sees", add_special_tokens=False)
    assert prompt + answer == ([1, *plain] if add_bos_token else plain)
    assert lm.tok_encode("<s>the cat") == TOKENIZER.encode("<s>the cat", add_special_tokens=False)


def test_log_probabilities_are_float32_on_a_bfloat16_model():
    model = tiny().bfloat16()
    lm = PromptSharingLM(model, TOKENIZER, batch_size=1, add_bos_token=True, progress=False)
    ids = [1, *TOKENIZER.encode(sentence(0), add_special_tokens=False)]
    ((score, _),) = lm._loglikelihood_tokens([(None, ids[:-1], ids[-1:])])
    logits = model(torch.tensor([ids[:-1]])).logits[0, -1].float()
    assert score == pytest.approx(logits.log_softmax(-1)[ids[-1]].item(), abs=1e-6)


# ---- perplexity


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_perplexity_is_the_exponential_of_the_mean_of_window_means(add_bos_token):
    model = tiny()
    text = " ".join(sentence(i) for i in range(20))
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    ids = [1, *ids] if add_bos_token else ids
    means = []
    for start in range(0, len(ids) // 16 * 16, 16):
        window = torch.tensor(ids[start : start + 16])
        logits = model(window[None]).logits[0].log_softmax(-1)
        means.append(-sum(logits[i, window[i + 1]].item() for i in range(15)) / 15)
    result = perplexity(model, TOKENIZER, text, window=16, add_bos_token=add_bos_token, progress=False)
    assert result["value"] == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-5)
    assert result["loss"] == pytest.approx(sum(means) / len(means), rel=1e-6)
    spread = torch.tensor(means).std().item() / math.sqrt(len(means))
    assert result["loss_stderr"] == pytest.approx(spread, rel=1e-4)
    assert result["losses"] == pytest.approx(means, abs=1e-5)
    assert (result["window"], result["windows"], result["tokens"]) == (16, len(means), 15 * len(means))


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(BadInput, match=r"eval.perplexity.window=100: must be at most 3, the tokens of the text"):
        perplexity(tiny(), TOKENIZER, "the cat", window=100, add_bos_token=True, progress=False)
