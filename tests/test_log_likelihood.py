"""Log-likelihoods against the stock harness and against plain forward passes."""

import math
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from conftest import make_tokenizer, sentence
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_evaluate import TOKENIZER, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from harness import log_likelihood
from harness.errors import BadInput
from harness.log_likelihood import PromptSharingLM
from harness.perplexity import perplexity

SMALL = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
PLAIN = {
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


@pytest.mark.parametrize("kind", PLAIN)
def test_sharing_prompts_changes_no_log_likelihood(kind):
    torch.manual_seed(0)
    shape = AutoConfig.for_model(kind, **SMALL, **PLAIN[kind], initializer_range=0.3, init_std=0.3)
    model = AutoModelForCausalLM.from_config(shape).eval()
    stock = ask(HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=4, add_bos_token=True))
    own = ask(PromptSharingLM(model, make_tokenizer(), batch_size=4, add_bos_token=True, progress=False))
    assert max(abs(score) for score, _ in stock) > 20
    assert [score for score, _ in own] == pytest.approx([score for score, _ in stock], abs=2e-4)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in stock]


@pytest.fixture(autouse=True)
def nothing_said_yet():
    log_likelihood._say_once.cache_clear()


def said(caplog):
    return [record.message for record in caplog.records if record.name == "lors"]


STATEFUL = ("mamba", "rwkv", "lfm2", "falcon_h1", "qwen3_next")
# Some layers read the keys and values of others, and have nothing in the cache.
GEMMA = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": len(TOKENIZER),
}
SHARED_KEYS = {
    "gemma3n_shared": Architecture("Gemma3nText", GEMMA | {"laurel_rank": 4}, model="Gemma3nForCausalLM"),
    "gemma4_shared": Architecture("Gemma4Text", GEMMA, model="Gemma4ForCausalLM"),
}
SCORED = ARCHITECTURES | {name: gemma for name, gemma in SHARED_KEYS.items() if gemma.exists}


SOON = ("mamba", "rwkv", "lfm2", "qwen3_next", "gemma4_shared")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in SCORED]
)
def test_any_architecture_is_scored_as_lm_eval_scores_it(name, caplog):
    """Those that see more than a mask shows them the stock way, and the log says so once."""
    architecture = SCORED[name]
    model = replace(architecture, fields=architecture.fields | {"vocab_size": len(TOKENIZER)}).build()
    stock = ask(HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=4, add_bos_token=True))
    for _ in range(2):
        own = ask(PromptSharingLM(model, make_tokenizer(), batch_size=4, add_bos_token=True, progress=False))
    assert [score for score, _ in own] == pytest.approx([score for score, _ in stock], abs=2e-4)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in stock]
    lines = said(caplog)
    assert len(lines) <= 1
    if name in STATEFUL:
        assert f"every answer is run with its prompt; {type(model).__name__} cannot share it" in lines[0]
    windows = torch.tensor([TOKENIZER.encode(sentence(0, 40))[:16]])
    assert math.isfinite(perplexity(model, windows, progress=False)["value"])


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_what_it_is_given_is_noticed(ignored, monkeypatch, caplog):
    """Its answers see one another, or stand too far from their prompt, in silence."""
    model = tiny()
    stock = ask(PromptSharingLM(model, TOKENIZER, batch_size=4, add_bos_token=True, progress=False))
    assert not said(caplog)
    forward = model.forward

    def deaf(input_ids=None, *, logits_to_keep=0, **given):
        return forward(input_ids, logits_to_keep=logits_to_keep, **(given | {ignored: None}))

    monkeypatch.setattr(model, "forward", deaf)
    own = ask(PromptSharingLM(model, TOKENIZER, batch_size=4, add_bos_token=True, progress=False))
    assert [score for score, _ in own] == pytest.approx([score for score, _ in stock], abs=2e-4)
    assert "LlamaForCausalLM cannot share it (a log-likelihood changes by " in said(caplog)[0]


def test_of_what_is_longer_than_the_model_the_end_counts(caplog):
    """The last tokens of the answer that fit, each after what fits of what was before it."""
    model = tiny()
    lm = PromptSharingLM(model, TOKENIZER, batch_size=4, add_bos_token=True, progress=False)
    lm._max_length = 64
    tokens = torch.randint(3, len(TOKENIZER), (80,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = model(torch.tensor([tokens[-65:-1]])).logits[0].log_softmax(-1)
    for prompt in (3, 15, 16, 17, 40):
        ((score, _),) = lm._loglikelihood_tokens([(None, tokens[:prompt], tokens[prompt:])])
        counted = min(64, 80 - prompt)
        own = sum(logits[i, token].item() for i, token in enumerate(tokens[-64:]) if i >= 64 - counted)
        assert score == pytest.approx(own, abs=2e-4), prompt
    assert said(caplog) == ["1 of 1 answers are longer than the model (64 tokens): their last tokens are scored"] * 2


def test_no_prompt_and_no_answer():
    lm = PromptSharingLM(tiny(), TOKENIZER, batch_size=4, add_bos_token=False, progress=False)
    first, second = lm._loglikelihood_tokens([(None, [], [5, 6]), (None, [1], [5, 6])])
    assert first == (pytest.approx(second[0], abs=1e-5), second[1])
    with pytest.raises(BadInput, match=r"eval.tasks: an answer has no token \(\('the cat', ''\)\)"):
        lm._loglikelihood_tokens([(("the cat", ""), [5], [])])


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
