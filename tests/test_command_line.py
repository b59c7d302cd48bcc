"""The command ``lors``, and ``lors.prune`` and ``lors.check`` on what a user has: texts, folders, an adapter."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, sentence
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lors
from lors import command_line
from lors.pruning import calibration_tokens

WEIGHT = "model.layers.0.mlp.down_proj.weight"
TEXTS = [sentence(i, 40) for i in range(40)]


def sparsity(folder: Path) -> float:
    return (load_file(folder / "model.safetensors")[WEIGHT] == 0).float().mean().item()


def adapted(base: Path, config: LoraConfig, folder: Path) -> Path:
    """The folder of an adapter whose update is not zero."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


# ---- in Python


def test_texts_prune_as_the_tokens_that_are_made_of_them(tiny_llama) -> None:
    """As many samples as do not overlap, each as long as the model has positions."""
    tokenizer = make_tokenizer()
    models = [tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=24) for _ in range(2)]
    lors.prune(models[0], sparsity=0.6, calibration=iter(TEXTS), tokenizer=tokenizer)
    tokens = calibration_tokens(TEXTS, tokenizer, length=24)
    words = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2 for text in TEXTS)  # BOS and EOS
    assert tokens.shape == ((words - 1) // 23, 24)
    assert calibration_tokens(200 * TEXTS, tokenizer, length=24).shape == (128, 24)
    lors.prune(models[1], "wanda", sparsity=0.6, pattern="unstructured", calibration=tokens)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize("texts", ["one text", TEXTS])
def test_texts_that_cannot_be_read_are_refused(tiny_llama, texts) -> None:
    tokenizer = make_tokenizer() if isinstance(texts, str) else None
    with pytest.raises(ValueError, match=r"calibration: got (str|texts without a tokenizer); allowed are"):
        lors.prune(tiny_llama(), calibration=texts, tokenizer=tokenizer)


def test_check_tells_the_zeros_of_every_layer(tiny_llama) -> None:
    model = tiny_llama()
    lors.prune(model, "magnitude", pattern="2:4")
    first = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        first[:2] = 0
    found = lors.check(model)
    assert found["pattern"] == "2:4" and len(found["layers"]) == 7 * len(model.model.layers)
    assert found["layers"].pop("model.layers.0.self_attn.q_proj") == 0.5 + 0.5 * 2 / len(first)
    assert set(found["layers"].values()) == {0.5}
    adapter = get_peft_model(model, lors.LorsConfig(r=2))
    assert lors.check(adapter)["sha256"] == found["sha256"] == adapter.peft_config["default"].support["sha256"]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = 0
    assert lors.check(model)["sha256"] != found["sha256"]


# ---- the command


@pytest.mark.parametrize("kind", ["texts.jsonl", "texts.jsonl.gz", "text.txt"])
def test_prune_writes_what_the_function_makes(tiny_checkpoint, tmp_path, kind, capsys) -> None:
    file, out = tmp_path / kind, tmp_path / "new" / "pruned"
    lines = "\n".join(TEXTS if kind == "text.txt" else [json.dumps({"text": text}) for text in TEXTS])
    file.write_bytes(gzip.compress(lines.encode()) if kind.endswith(".gz") else lines.encode())
    words = f"prune {tiny_checkpoint} {out} --sparsity 0.6 --calibration {file} --samples 8 --length 16 --seed 1"
    assert command_line.main(words.split()) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    documents = [lines] if kind == "text.txt" else TEXTS
    tokens = calibration_tokens(documents, tokenizer, samples=8, length=16, seed=1)
    lors.prune(expected, sparsity=0.6, calibration=tokens)
    written = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(written.parameters(), expected.parameters(), strict=True))
    found = lors.check(written)
    assert capsys.readouterr().out.startswith(f"sparsity {found['sparsity']:.6f}, pattern unstructured, sha256")
    assert [path.name for path in out.parent.iterdir()] == ["pruned"]


def test_c4_is_the_file_of_the_papers(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    file = tmp_path / "c4.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"text": TEXTS[0]}).encode()))
    asked = []
    monkeypatch.setattr(command_line, "hf_hub_download", lambda **source: asked.append(source) or str(file))
    words = f"prune {tiny_checkpoint} {tmp_path / 'out'} --pattern 2:4 --samples 2 --length 8"
    assert command_line.main(words.split()) == 0
    assert [source["filename"] for source in asked] == ["en/c4-train.00000-of-01024.json.gz"]
    assert lors.check(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))["pattern"] == "2:4"


def test_merge_keeps_the_zeros_and_check_shows_them(tiny_checkpoint, tmp_path, capsys) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    assert command_line.main(["prune", str(tiny_checkpoint), str(base), "--pruner", "magnitude"]) == 0
    adapter = adapted(base, lors.LorsConfig(r=2, task_type="CAUSAL_LM"), tmp_path / "adapter")
    assert command_line.main(["merge", str(adapter), str(out)]) == 0
    capsys.readouterr()
    assert command_line.main(["check", str(out)]) == 0
    total, *layers = capsys.readouterr().out.splitlines()
    assert total == f"sparsity 0.500000, pattern unstructured, sha256 of the zeros {sha256(base)}"
    assert len(layers) == 14 and all(line.endswith(" 0.500000") for line in layers)
    assert sparsity(out) == 0.5
    weights = [load_file(folder / "model.safetensors")[WEIGHT] for folder in (base, out)]
    assert not torch.equal(*weights)
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(base))


def sha256(folder: Path) -> str:
    return lors.check(AutoModelForCausalLM.from_pretrained(folder))["sha256"]


def test_a_merge_that_fills_zeros_writes_nothing(tiny_checkpoint, tmp_path, capsys) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    assert command_line.main(["prune", str(tiny_checkpoint), str(base), "--pruner", "magnitude"]) == 0
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["down_proj"])
    adapter = adapted(base, config, tmp_path / "adapter")
    assert command_line.main(["merge", str(adapter), str(out)]) == 1
    zeros = 2 * load_file(base / "model.safetensors")[WEIGHT].numel() // 2
    expected = f"lors merge: {adapter}: its merge fills {zeros} zeros of {base}; nothing is written"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prune {model} {model}", "lors prune: {model}: must be a new folder, and is there"),
        (
            "prune {model} {out} --sparsity 1.5 --calibration {texts} --length 8",
            "sparsity=1.5: allowed is a number with",
        ),
        ("prune {model} {out} --calibration {out}.txt", "No such file"),
        ("prune {model} {out} --calibration {model}/config.json", "config.json:1: "),
        ("prune {model} {out} --calibration {texts} --length 99999", "--length 99999: must be at most"),
        ("check {out}", "{out}"),
    ],
)
def test_what_is_wrong_is_one_line(tiny_checkpoint, tmp_path, capsys, words: str, message: str, no_network) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text(" ".join(TEXTS))
    places = {"model": tiny_checkpoint, "out": tmp_path / "out", "texts": texts}
    assert command_line.main(words.format(**places).split()) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert message.format(**places) in error
    assert not (tmp_path / "out").exists()


def test_merge_writes_the_tokenizer_of_the_adapter_if_it_has_one(tiny_checkpoint, tmp_path) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    assert command_line.main(["prune", str(tiny_checkpoint), str(base), "--pruner", "magnitude"]) == 0
    adapter = adapted(base, lors.LorsConfig(r=2, task_type="CAUSAL_LM"), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    assert command_line.main(["merge", str(adapter), str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert len(AutoTokenizer.from_pretrained(out)) == len(tokenizer) == merged.get_input_embeddings().num_embeddings


def test_samples_are_no_longer_than_the_model_has_positions(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(command_line, "calibration_tokens", lambda *_, length, **__: seen.append(length) or 1 / 0)
    texts = tmp_path / "texts.txt"
    texts.write_text(" ".join(TEXTS))
    with pytest.raises(ZeroDivisionError):
        command_line.main(["prune", str(tiny_checkpoint), str(tmp_path / "out"), "--calibration", str(texts)])
    positions = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).config.max_position_embeddings
    assert seen == [min(2048, positions)]
