"""What a run leaves for other programs: adapters, pruned bases, merged models, compressed weights.

The tests marked slow read each of them in a fresh virtual environment that has nothing but its reader.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import transformers
from conftest import sentence, write_rows
from huggingface_hub import ModelCard
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors import safe_open
from test_harness_run import NO_SCORES, tiny_overrides
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lors
from harness import run as harness_run
from harness.microworld import CHECKPOINT
from harness.model_card import Base, base_of, write_card
from harness.run import execute
from harness.store import RunStore
from lors.compressed_file import FILE
from lors.pruning import prune_model
from lors.sparsity import sparsity_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "artifacts.md").read_text(encoding="utf-8")
TOKENS = torch.arange(10)[None] + 5

# Folders of a run


@pytest.fixture(scope="module")
def run(composed, tiny_checkpoint, tiny_sources, tmp_path_factory) -> Callable[..., tuple[dict, Path]]:
    """Function from overrides to the result and the folder of a run of seconds."""
    place = tmp_path_factory.mktemp("run")

    def execute_(*overrides: str) -> tuple[dict, Path]:
        cfg = composed(*tiny_overrides(tiny_checkpoint, tiny_sources, place), "train.steps=2", *overrides)
        result = execute(cfg)
        assert result["status"] == "ok", result["error"]
        return result, Path(cfg.runs_root) / cfg.name / result["key"]

    return execute_


@pytest.fixture(scope="module")
def live(run) -> tuple[Path, Tensor]:
    """The folder of a run of LoRS with adapter, base and merged model, and the logits of its model while it ran."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        evaluate = harness_run.evaluate
        patch.setattr(harness_run, "evaluate", lambda model, *rest: seen.append(of(model)) or evaluate(model, *rest))
        folder = run("method=lors", "save_merged=true", "save_base=true")[1]
    (logits,) = seen
    return folder, logits


@pytest.fixture(scope="module")
def folder(live) -> Path:
    return live[0]


def of(model: nn.Module) -> Tensor:
    """Logits of a model of `tiny_checkpoint`."""
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def blocks(text: str, language: str = "python") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_cards_say_what_a_reader_needs(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert {name: result["artifacts"][name] for name in ("adapter", "base", "merged")} == {
        name: name for name in ("adapter", "base", "merged")
    }
    for name, library in (("adapter", "peft"), ("base", "transformers"), ("merged", "transformers")):
        card = card_of(folder / name)
        assert card.data.library_name == library and card.data.pipeline_tag == "text-generation"
        assert {"pruned", "sparse"} <= set(card.data.tags) and ("lors" in card.data.tags) == (name != "base")
        for text in (
            "50 % zeros",
            "wanda",
            result["support"]["sha256"],
            result["key"],
            "arc_easy (acc)",
            "from_pretrained",
        ):
            assert text in card.text, (name, text)
        assert "More Information Needed" not in card.text and "PEFT 0." in card.text
    text = card_of(folder / "adapter").text
    for part in (
        "`import lors` before PEFT",
        "r 4",
        "learning_rate",
        "instructions.jsonl",
        "at the peak",
        "fine-tuned |",
    ):
        assert part in text, part


def test_no_folder_names_a_place_of_this_machine(folder: Path, tiny_checkpoint: Path) -> None:
    for name in ("adapter", "base", "merged"):
        for file in (folder / name).iterdir():
            if file.suffix in (".json", ".md"):
                text = file.read_text()
                assert str(folder.parents[2]) not in text and str(tiny_checkpoint) not in text, file
                assert "local_files_only" not in text, file


def test_an_adapter_is_loaded_by_every_way(live, monkeypatch) -> None:
    folder, logits = live
    base, adapter = str(folder / "base"), str(folder / "adapter")
    expected = of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    torch.testing.assert_close(expected, logits)
    assert (of(AutoModelForCausalLM.from_pretrained(base)) - logits).abs().max() > 0.1, "the adapter does something"
    assert torch.equal(of(AutoModelForCausalLM.from_pretrained(folder / "merged")), logits)
    elsewhere = f"{folder}-elsewhere"
    shutil.copytree(folder, elsewhere)
    monkeypatch.chdir(elsewhere)
    (block,) = blocks(card_of(Path("adapter")).text)
    names = {}
    exec(block, names)
    assert torch.equal(of(names["model"]), expected)
    assert torch.equal(of(AutoModelForCausalLM.from_pretrained("adapter")), expected)
    plain = AutoModelForCausalLM.from_pretrained("base")
    plain.load_adapter("adapter")
    assert torch.equal(of(plain), expected)
    monkeypatch.chdir("/")
    with pytest.raises(OSError, match=r"\./base"):
        AutoPeftModelForCausalLM.from_pretrained(adapter)


@pytest.mark.parametrize(
    ("overrides", "source", "base"),
    [
        ([], {"source": "org/dense", "revision": "abc"}, Base("./base", None, "org/dense")),
        (["prune=none"], {"source": "org/pruned", "revision": "abc"}, Base("org/pruned", "abc", "org/pruned")),
        (["prune=none"], {"source": "org/pruned", "values": "four-bit"}, Base("./base", None, "org/pruned")),
        (["prune=none", "save_base=true"], {"source": "org/pruned"}, Base("./base", None, "org/pruned")),
        (["prune.when=after"], {"source": "org/dense", "revision": "abc"}, Base("org/dense", "abc", "org/dense")),
        (["prune=none"], {"source": "a folder", "sha256": "sha256:0"}, Base("my/folder")),
        ([], {"source": "a folder", "sha256": "sha256:0"}, Base("./base")),
        (["prune=none"], {"source": "microworld"}, Base("./base")),
    ],
)
def test_which_base_an_adapter_names(composed, overrides, source, base) -> None:
    cfg = composed("model=hf", "model.path=my/folder", "cache_root=/cache", *overrides)
    assert base_of(cfg, {"model.path": source}) == base


def test_a_card_of_a_model_of_the_hub_links_it(folder: Path, tmp_path: Path) -> None:
    result, peft = json.loads((folder / "result.json").read_text()), PeftConfig.from_pretrained(folder / "adapter")
    write_card(tmp_path, "adapter", result, Base("org/pruned", "abc", "org/pruned"), dtype="bfloat16", peft=peft)
    card = card_of(tmp_path)
    data = card.data
    assert "revision abc" in card.text
    assert (data.base_model, data.base_model_relation) == ("org/pruned", "adapter")
    assert "base_model:adapter:org/pruned" in data.tags


def test_lora_names_its_end_state_and_an_unwritten_base(run) -> None:
    _, folder = run("method=lora", "save_merged=true", *NO_SCORES)
    assert (
        "Every zero of the pruned model is zero, put back after the merge; 50.00% of the weights"
        in card_of(folder / "merged").text
    )
    text = card_of(folder / "adapter").text
    assert "import lors" not in text and "which the run has not written (`save_base=true` does)" in text
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "./base"
    assert not (folder / "base").exists()


def test_the_cards_of_a_control_say_where_its_zeros_are(run) -> None:
    _, folder = run("method=lors", "prune.when=after", *NO_SCORES, "save_merged=true", "save_base=true")
    for name in ("adapter", "base"):
        card = card_of(folder / name)
        assert "not pruned" in card.text and "sparse" not in card.data.tags and "wanda" not in card.text
    merged = card_of(folder / "merged")
    assert "50 % zeros" in merged.text and "wanda, after the fine-tuning" in merged.text


def assert_plain(folder: Path) -> None:
    """What transformers alone reads, and what vLLM's config and weight loading asks for.

    From vLLM's transformers_utils/config.py, config/model.py and model_loader: a known model_type and architecture, no
    code to trust, a dtype, no quantization_config nor hf_quant_config.json, every weight in safetensors files under the
    name that the architecture has, an index that names each once, and no adapter in the folder.
    """
    config = json.loads((folder / "config.json").read_text())
    known = AutoConfig.for_model(config["model_type"])
    model_class = getattr(transformers, config["architectures"][0])
    assert config["architectures"] == [AutoModelForCausalLM._model_mapping[type(known)].__name__]
    assert config["dtype"] in ("float32", "bfloat16", "float16")
    extra = set(config) - set(known.to_dict()) - {"architectures", "transformers_version", "dtype"}
    assert not extra, "attributes that the architecture does not have"
    assert not [
        key for key in config if key in ("quantization_config", "auto_map", "compression_config", "peft_config")
    ]
    files = {entry.name for entry in folder.iterdir()}
    assert not files & {"hf_quant_config.json", "adapter_config.json", "params.json"} and ".py" not in str(files)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} <= files
    stored = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert name not in stored
                stored[name] = (file.name, opened.get_slice(name).get_dtype())
    with torch.device("meta"):
        model = model_class(AutoConfig.from_pretrained(folder))
    tied = set(model.all_tied_weights_keys)
    assert set(model.state_dict()) - tied <= set(stored) <= set(model.state_dict())
    assert {kind for _, kind in stored.values()} == {{"float32": "F32", "bfloat16": "BF16"}[config["dtype"]]}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"] == {name: file for name, (file, _) in stored.items()}
    else:
        assert set(file for file, _ in stored.values()) == {"model.safetensors"}


def test_a_merged_model_is_a_plain_folder(folder: Path) -> None:
    assert_plain(folder / "merged")
    assert_plain(folder / "base")
    merged, base = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("merged", "base"))
    for name, W in base.state_dict().items():
        assert not merged.state_dict()[name][W == 0].any(), name
    assert sparsity_of(merged) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_in_bfloat16_and_in_several_files_too(run, monkeypatch, method: str) -> None:
    save = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", partialmethod(save, max_shard_size="40KB"))
    _, folder = run(f"method={method}", "save_merged=true", "train.precision=bf16_mixed", *NO_SCORES)
    assert len(list((folder / "merged").glob("*.safetensors"))) > 1
    assert_plain(folder / "merged")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    with store.artifact("merged") as folder:
        (folder / "weights").write_text("first")
    with pytest.raises(KeyboardInterrupt), store.artifact("merged") as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert [entry.name for entry in store.directory.iterdir()] == ["merged"]
    assert (store.directory / "merged" / "weights").read_text() == "first"


def test_the_loader_in_the_docs_reads_what_is_written_there(folder: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(folder / "merged", tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    save, load, loader, convert = blocks(PAGE)[1:]
    exec(save, {})
    for name in ("lors", "transformers", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    names = {}
    exec(loader, names)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    exec(load, names)
    assert torch.equal(of(names["model"]), of(AutoModelForCausalLM.from_pretrained("merged")))
    lines = [line for line in loader.splitlines() if line.strip()]
    assert len(lines) <= 40
    compile(convert, "docs/artifacts.md", "exec")


def test_the_sizes_in_the_docs_are_those_of_the_files(tmp_path: Path) -> None:
    rows = re.findall(r"^\| microworld, (\w+) \| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for dtype, zeros, *sizes in rows:
        model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype)
        pattern, sparsity = ("2:4", None) if zeros == "2:4" else ("unstructured", float(zeros))
        prune_model(model, "magnitude", sparsity=sparsity, pattern=pattern, calibration=None)
        model.save_pretrained(tmp_path)
        lors.save_compressed(model, tmp_path)
        dense, compressed = ((tmp_path / name).stat().st_size for name in ("model.safetensors", FILE))
        assert sizes == [f"{dense / 1e6:.2f}", f"{compressed / 1e6:.2f}", f"{compressed / dense:.2f}"]


# Fresh environments

LOGITS = """
import importlib.util, sys, torch
with torch.no_grad():
    torch.save(model.eval()(torch.arange(10)[None] + 5).logits, "logits.pt")
there = [name for name in ("lors", "peft", "accelerate", "lm_eval", "harness") if importlib.util.find_spec(name)]
assert there == sys.argv[1:], there
"""


def lm_eval_task(folder: Path) -> Path:
    """A folder with a task `tiny` of lm-eval: multiple choice, from a file."""
    answers = [[sentence(i + k, 3) for k in (1, 2)] for i in range(8)]
    rows = [{"question": sentence(i), "choices": answers[i], "answer": i % 2} for i in range(8)]
    file = write_rows(folder / "tasks" / "rows.jsonl", rows)
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (file.parent / "tiny.yaml").write_text(json.dumps(task))
    return file.parent


def assert_scores(folder: Path, model: HFLM) -> None:
    """What lm-eval has written there are the log-likelihoods of a model."""
    (file,) = folder.rglob("samples_tiny_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 8
    for sample in samples:
        prompts = [tuple(arguments.values()) for arguments in sample["arguments"].values()]
        requests = [Instance("loglikelihood", sample["doc"], prompt, i) for i, prompt in enumerate(prompts)]
        expected = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
        assert [float(value) for value, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_each_folder_loads_where_there_is_nothing_but_its_reader(live, tmp_path: Path) -> None:
    """One environment that grows: transformers; the wheel, which brings peft; lm-eval."""
    home, expected = shutil.copytree(live[0], tmp_path / "home"), live[1]
    merged = AutoModelForCausalLM.from_pretrained(home / "merged")
    lors.save_compressed(merged, home / "compressed")
    here = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    here |= {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "HF_HOME": f"{tmp_path}/cache", "HF_HUB_OFFLINE": "1"}

    def call(*command: str) -> None:
        done = subprocess.run(command, cwd=home, env=here, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"

    def install(*packages: str) -> None:
        call("pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *packages)

    def check(code: str, *there: str) -> None:
        call("python", "-c", code + LOGITS, *there)
        torch.testing.assert_close(torch.load(home / "logits.pt"), expected)

    call(sys.executable, "-m", "venv", f"{tmp_path}/venv")
    install("torch", "transformers")
    check(*blocks(card_of(home / "merged").text))
    _, _, load, loader, _ = blocks(PAGE)
    check(loader + load)

    source = tmp_path / "source"
    shutil.copytree(ROOT / "lors", source / "lors")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call("pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source))
    install(*map(str, tmp_path.glob("lors-*.whl")))
    with_peft = ("lors", "peft", "accelerate")
    check(*blocks(card_of(home / "adapter").text), *with_peft)
    check("import lors\n" + blocks(card_of(home / "base").text)[0].replace("base", "adapter", 1), *with_peft)

    install("lm_eval[hf]")
    options = f"--include_path {lm_eval_task(tmp_path)} --device cpu --batch_size 4 --log_samples --output_path"
    tokenizer = AutoTokenizer.from_pretrained(home / "merged")
    for number, command in enumerate(blocks(PAGE, "")):
        words = shlex.split(command.replace("\\\n", " ").replace("arc_easy", "tiny"))
        call(*words, *options.split(), f"{tmp_path}/scores{number}")
        assert_scores(tmp_path / f"scores{number}", HFLM(merged, tokenizer=tokenizer))
