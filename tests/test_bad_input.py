"""Bad input: one line that names the key, the value and what is allowed, before any model is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from lors.harness.pipeline import execute
from lors.harness.config import resolve
from lors.harness.errors import BadInput

ROOT = Path(__file__).parents[1]


@pytest.fixture
def refused(composed, tiny_checkpoint, tiny_sources, tmp_path, monkeypatch):
    """Function from overrides to the message that the run is refused with, before weights are loaded."""

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
    defaults = [
        "model=hf",
        f"model.path={tiny_checkpoint}",
        "data=alpaca",
        f"data.path={tiny_sources}/instructions.jsonl",
        f"prune.text={tiny_sources}/text.jsonl",
        "prune.sequence_length=32",
        "eval=zeroshot",
        f"eval.data_root={tiny_sources}",
        "eval.tasks=[rte]",
        "eval.perplexity=null",
        "adapter.r=4",
        f"runs_root={tmp_path}/runs",
        f"cache_root={tmp_path}/cache",
    ]

    def run(*overrides: str) -> str:
        with pytest.raises(BadInput) as refusal:
            execute(composed(*defaults, *overrides))
        message = str(refusal.value)
        assert "\n" not in message
        assert not list((tmp_path / "runs").rglob("*.json")), "a refused run leaves nothing"
        return message

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mode=simulated", "mode=simulated: must be one of run, profile"),
        ("seed=-1", "seed=-1: must be a whole number >= 0"),
        ("sparsity=1", "sparsity=1: allowed is a number with 0 <= sparsity < 1"),
        ("sparsity=-0.1", "sparsity=-0.1: allowed is a number with 0 <= sparsity < 1"),
        ("sparsity=half", "sparsity='half': allowed is a number with 0 <= sparsity < 1"),
        ("pattern=4:2", "pattern='4:2': allowed are unstructured and 'n:m'"),
        ("train.steps=abc", "train.steps=abc: must be a whole number >= 1"),
        ("train.steps=0", "train.steps=0: must be a whole number >= 1"),
        ("train.steps=1.5", "train.steps=1.5: must be a whole number >= 1"),
        ("train.steps=true", "train.steps=True: must be a whole number >= 1"),
        ("train.batch_size=0", "train.batch_size=0: must be a whole number >= 1"),
        ("train.gradient_accumulation=0", "train.gradient_accumulation=0: must be a whole number >= 1"),
        ("train.epochs=0", "train.epochs=0: must be a number > 0, or null"),
        ("train.learning_rate=fast", "train.learning_rate=fast: must be a number > 0"),
        ("train.minimum_learning_rate=1", "train.minimum_learning_rate=1: must be at most train.learning_rate"),
        ("train.betas=[0.9]", "train.betas=[0.9]: must be two numbers"),
        ("train.betas=[0.9,1]", "train.betas=[0.9, 1]: must be a non-empty list, each entry a number with"),
        ("train.precision=fp8", "train.precision=fp8: must be one of float32, bf16_mixed, bf16"),
        ("train.pad=left", "train.pad=left: must be one of longest, fixed"),
        ("eval.batch_size=0", "eval.batch_size=0: must be a whole number >= 1"),
        ("eval.tasks=rte", "eval.tasks=rte: must be a list, each entry a text that is not empty"),
        ("eval.limit=0", "eval.limit=0: must be a whole number >= 1, or null"),
        ("eval.add_bos_token=null", "eval.add_bos_token=null: must be true or false"),
        ("adapter.r=0", "adapter.r=0: must be a whole number >= 1"),
        ("adapter.alpha=0", "adapter.alpha=0: must be a number > 0"),
        ("adapter.targets=[]", "adapter.targets=[]: must be one of all-linear, or a non-empty list"),
        ("prune.samples=0", "prune.samples=0: must be a whole number >= 1 for prune=wanda"),
        ("prune.name=random", "prune.name=random: must be one of none, magnitude, wanda, sparsegpt"),
        ("data.kind=images", "data.kind=images: must be one of microworld, instruction, text"),
        ("data.path=null", "data.path=null: must be a file or a name on the Hub for data.kind=instruction"),
        ("model.layers=1", "model.layers=1: must be null in mode=run"),
        ("launch.arguments=3", "launch.arguments=3: must be a list"),
    ],
)
def test_values_that_are_not_allowed(composed, override: str, message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        resolve(composed("data=alpaca", override))
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sparsity=0.7", "pattern=2:4"), "sparsity=0.7 contradicts pattern='2:4'"),
        (("sparsity=0.5", "prune=none"), "sparsity=0.5: must be 0 or left out with prune=none"),
        (("model=hf",), "model.path: must be given, as in model.path=VALUE"),
        (("data=text",), "data.path: must be given"),
        (("mode=profile", "train.epochs=1"), "train.epochs=1: must be null in mode=profile"),
        (("train.steps=${nowhere}",), "Interpolation key 'nowhere' not found"),
    ],
)
def test_values_that_contradict_each_other(composed, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        resolve(composed(*overrides))
    assert str(refusal.value).startswith(message)


def test_more_than_one_process_is_refused(composed, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="must start one process, not 2"):
        resolve(composed("launch=torchrun"))


def test_a_rank_above_a_width(refused) -> None:
    """k_proj is 16 x 32: two of four heads are keys."""
    assert refused("adapter.r=17") == (
        "adapter.r=17: must be at most 16, because model.layers.0.self_attn.k_proj is 16 x 32"
    )


def test_targets_that_the_model_does_not_have(refused) -> None:
    assert "method=lors: " in refused("adapter.targets=[query]")


def test_a_value_that_the_config_of_the_method_refuses(refused) -> None:
    message = refused("method.peft.scaling=loud")
    assert message.startswith("method=lors: ") and "scaling" in message and "loud" in message


def test_a_rank_that_does_not_divide_what_the_method_needs(refused) -> None:
    assert refused("method=spp", "adapter.r=5").startswith("method=spp: ")


def test_a_pattern_that_does_not_divide_a_width(refused) -> None:
    """The hidden width is 32, that of the feed-forward layer 48."""
    assert refused("pattern=3:5").startswith("pattern='3:5': groups of 5 do not divide the input width 32")
    assert "input width 48 of model.layers.0.mlp.down_proj" in refused("pattern=8:32", "sparsity=0.75")


def test_rows_longer_than_the_positions_of_the_model(refused) -> None:
    assert refused("train.sequence_length=129").startswith("train.sequence_length=129: must be at most 128")
    assert refused("prune.sequence_length=129").startswith("prune.sequence_length=129: must be at most 128")


def test_missing_model(refused) -> None:
    assert refused("model.path=./nowhere").startswith("model.path=./nowhere: no such folder")
    assert refused("model.path=nobody/nothing").startswith("model.path=nobody/nothing: no such folder")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "no usable config.json"),
        ("tokenizer.json", "the folder has no tokenizer (tokenizer.json, tokenizer.model, vocab.json)"),
        ("model.safetensors", "the folder has no weights (*.safetensors, *.bin)"),
    ],
)
def test_model_folder_with_a_part_missing(refused, tiny_checkpoint, tmp_path, removed, message) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / removed).unlink()
    assert message in refused(f"model.path={folder}")


def test_a_tokenizer_that_does_not_belong_to_the_model(refused, tiny_checkpoint, tmp_path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "tokens, the model 100" in refused(f"model.path={folder}")


def test_missing_training_file(refused) -> None:
    assert refused("data.path=/no/such.jsonl") == "data.path=/no/such.jsonl: no such file"


def test_malformed_line_is_named_by_file_and_number(refused, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    assert f"{file}:2" in refused(f"data.path={file}")


def test_empty_training_file(refused, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    assert f"data.path={file}" in refused(f"data.path={file}")


def test_missing_and_short_calibration_text(refused, tmp_path) -> None:
    assert refused("prune.text=/no/such.jsonl") == "prune.text=/no/such.jsonl: no such file"
    file = tmp_path / "short.jsonl"
    file.write_text('{"text": "the cat"}\n')
    assert "prune.sequence_length=32" in refused(f"prune.text={file}")


def test_missing_task_file(refused, tiny_sources) -> None:
    assert f"{tiny_sources}/boolq/validation.jsonl" in refused("eval.tasks=[boolq]")


def test_missing_perplexity_text(refused) -> None:
    message = refused("eval.perplexity={text:/no/such.txt,window:16}")
    assert message == "eval.perplexity.text=/no/such.txt: no such file"


def test_a_folder_that_takes_no_files(refused, tmp_path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert refused(f"runs_root={blocked}").startswith("runs_root: cannot write to ")


def test_more_layers_than_the_model_has(refused) -> None:
    assert refused("mode=profile", "model.layers=3") == ("model.layers=3: must be at most 2, the layers of the model")


METHODS = ", ".join(sorted(file.stem for file in (ROOT / "conf/method").glob("*.yaml")))


def run_py(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=lrs"], f"error: method=lrs: must be one of {METHODS}\n"),
        (["-m", "method=lors,lrs"], f"error: method=lrs: must be one of {METHODS}\n"),
        (["trian.steps=3"], "error: trian.steps=3: no such key; did you mean train.steps?"),
        (["method.peft.rank=3"], "error: method.peft.rank=3: no such key; did you mean method.peft.r?"),
        (["sparsity"], "error: sparsity: must be name=value"),
        (["sparsity=1.5"], "error: sparsity=1.5: allowed is a number with 0 <= sparsity < 1"),
    ],
)
def test_the_command_line_answers_with_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    run = run_py(*arguments)
    assert run.returncode == 2
    assert run.stderr.startswith(message), run.stderr
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
