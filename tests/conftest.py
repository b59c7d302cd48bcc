"""Fixtures that several test files share: a small random Llama, a tokenizer and tasks for it, all offline."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

# Before any library of Hugging Face is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported, here and in the processes that tests start: pytest runs a worker on every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.blocks import composing_once

CONF = Path(__file__).parents[1] / "conf"
WORDS = "the a cat dog bird fish tree house river stone red blue green big old sees likes has is not yes".split()


def make_tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A random Llama: hidden 32, 2 layers, 4 heads (2 of keys and values), ffn 48, vocabulary 64."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(shape | overrides))).eval()


def make_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <pad> 0, <s> 1, </s> 2, which puts <s> in front."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True
    )


def recipe(**fields: object) -> SimpleNamespace:
    """The keys of ``train`` that a training of the small model needs: seven steps of two micro-batches of two rows."""
    keys = {
        **{"steps": 7, "epochs": None, "batch_size": 2, "gradient_accumulation": 2, "sequence_length": 10},
        **{"learning_rate": 1e-2, "minimum_learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.0},
        **{
            "betas": [0.9, 0.999],
            "max_grad_norm": 1.0,
            "precision": "float32",
            "activation_checkpointing": False,
            "logits_at_once": None,
        },
        "checkpoint_every": 2,
    }
    return SimpleNamespace(**(keys | fields))


def sentence(index: int, length: int = 9) -> str:
    """A sentence of known words, another for every index."""
    return " ".join(WORDS[(index * 7 + position * (index % 5 + 1)) % len(WORDS)] for position in range(length))


def write_rows(file: Path, rows: list[dict]) -> Path:
    """Write JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@cache
def composed_by_hydra(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@cache
def common_keys() -> DictConfig:
    """Those that ``conf/config.yaml`` has itself."""
    return OmegaConf.load(CONF / "config.yaml")


def with_options(options: list[str]) -> DictConfig:
    """What Hydra composes of options; as it takes its time, put together from those files that refer to no others."""
    files = [CONF / group / f"{name}.yaml" for group, _, name in (option.partition("=") for option in options)]
    if not all(file.exists() and not re.search("^defaults:|@package", file.read_text(), re.M) for file in files):
        return composed_by_hydra(*options)
    cfg = copy.deepcopy(composed_by_hydra())
    OmegaConf.set_struct(cfg, False)
    for file in files:
        cfg[file.parent.name] = OmegaConf.merge(common_keys().get(file.parent.name, {}), OmegaConf.load(file))
    OmegaConf.set_struct(cfg, True)
    return cfg


composed_once = composing_once(with_options, {folder.name for folder in CONF.iterdir() if folder.is_dir()})


def compose_config(*overrides: str) -> DictConfig:
    """The config that ``python run.py <overrides>`` composes."""
    return composed_once(overrides)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Trainer and measured steps collect garbage; what the imports have made is none, and half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let the interpreter take down at its end what was frozen."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    """Function that composes a config: ``composed("method=lora", "seed=1")``."""
    return compose_config


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes whatever reaches for the network fail."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    for holder, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(holder, name, refuse)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Factory of small random Llamas: ``tiny_llama(seed=0, **config_fields)``."""
    return make_tiny_llama


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random Llama with a tokenizer, as `model=hf model.path=` takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    make_tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with instructions, plain text, and two zero-shot tasks in the columns that lm-eval expects."""
    folder = tmp_path_factory.mktemp("sources")
    write_rows(
        folder / "instructions.jsonl",
        [{"instruction": sentence(i), "input": "", "output": sentence(i + 1, 5)} for i in range(24)],
    )
    write_rows(folder / "text.jsonl", [{"text": sentence(i, 40)} for i in range(40)])
    letters = ["A", "B", "C", "D"]
    write_rows(
        folder / "arc_easy" / "test.jsonl",
        [
            {
                "id": str(i),
                "question": sentence(i),
                "choices": {"text": [sentence(i + k, 3) for k in range(4)], "label": letters},
                "answerKey": letters[i % 4],
            }
            for i in range(8)
        ],
    )
    write_rows(
        folder / "rte" / "validation.jsonl",
        [{"sentence1": sentence(i), "sentence2": sentence(i + 1, 4), "label": i % 2, "idx": i} for i in range(8)],
    )
    return folder
