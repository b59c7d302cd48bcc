"""The real commands against a Hub on the loopback: models, data sets and tasks by name, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import sentence
from hub_server import Hub, commit_of
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
STEPS = ["train.steps=2", "train.warmup_steps=0", "train.batch_size=2", "train.gradient_accumulation=1"]
SMALL = ["method=none", "sparsity=0.5", "train.sequence_length=32", *STEPS]
PLAIN = ["model=hf", "prune=magnitude", "eval=none", *SMALL]
FULL = ["model=hf", "model.path=org/tiny", "prune=wanda", "prune.samples=4", "prune.sequence_length=32", "data=alpaca"]
FULL += ["eval=zeroshot", "eval.tasks=[arc_easy,rte]", "eval.limit=2", "eval.perplexity.window=64", *SMALL]


def parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def hub(tiny_checkpoint: Path, tiny_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Models of this bench's users, and the data sets that its configs and lm-eval name."""
    folder = tmp_path_factory.mktemp("hub")

    def model(name: str) -> Path:
        return shutil.copytree(tiny_checkpoint, folder / name)

    weights = load_file(tiny_checkpoint / "model.safetensors")
    torch.save(weights, model("bin") / "pytorch_model.bin")
    (folder / "bin/model.safetensors").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/tiny"}
    (model("adapter") / "adapter_config.json").write_text(json.dumps(adapter))
    name = "model.layers.0.mlp.down_proj.weight"
    integers = weights | {name: (weights[name] * 127).to(torch.int8)}
    save_file(integers, model("integers") / "model.safetensors", {"format": "pt"})
    save_file(weights | {name: weights[name] * 2}, model("pushed") / "model.safetensors", {"format": "pt"})

    parquet(folder / "alpaca/data/train-00000-of-00001.parquet", lines(tiny_sources / "instructions.jsonl"))
    documents = lines(tiny_sources / "text.jsonl")
    for shard in range(2):
        content = "".join(json.dumps(row | {"url": "u"}) + "\n" for row in documents[shard::2])
        file = folder / f"c4/en/c4-train.0000{shard}-of-01024.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(content.encode()))
    rows = [{"text": ""}, {"text": " = A title = \n"}, {"text": ""}, {"text": f" {sentence(1, 90)} . \n"}]
    parquet(folder / "wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet", rows)
    for split in ("train", "test"):
        parquet(folder / f"arc/ARC-Easy/{split}-0.parquet", lines(tiny_sources / "arc_easy/test.jsonl"))
    shutil.copytree(tiny_sources / "rte", folder / "glue/rte")
    shutil.copy(tiny_sources / "rte/validation.jsonl", folder / "glue/rte/train.jsonl")
    parquet(folder / "script/data/train-00000-of-00001.parquet", documents)
    (folder / "script/script.py").write_text("raise SystemExit('run')")
    for name, config, *splits in (
        ("c4", "en", "train"),
        ("wikitext", "wikitext-2-raw-v1", "test"),
        ("arc", "ARC-Easy", "train", "test"),
        ("glue", "rte", "train", "validation"),
    ):
        files = [{"split": split, "path": f"{config}/*{split}*"} for split in splits]
        card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
        (folder / name / "README.md").write_text(f"---\n{card}\n---\n")
    with Hub() as server:
        server.add("models/org/tiny", tiny_checkpoint)
        for name in ("bin", "adapter", "integers", "pushed"):
            server.add(f"models/org/{name}", folder / name)
        for name, status in (("login", 401), ("terms", 403)):
            server.add(f"models/org/{name}", tiny_checkpoint)
            server.gated[f"models/org/{name}"] = status
        names = {"vicgalle/alpaca-gpt4": "alpaca", "allenai/c4": "c4", "Salesforce/wikitext": "wikitext"}
        names |= {"allenai/ai2_arc": "arc", "nyu-mll/glue": "glue", "org/script": "script"}
        for name, place in names.items():
            server.add(f"datasets/{name}", folder / place)
        yield server
        server.shutdown()


Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def command(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Runs a command line in an environment with an empty cache; gives its exit code and what it has printed."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    session = [sys.executable, str(Path(__file__).with_name("hub_session.py"))]
    with subprocess.Popen(session, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:

        def execute(*arguments: str) -> tuple[int, str]:
            child.stdin.write(json.dumps(arguments) + "\n")
            child.stdin.flush()
            return tuple(json.loads(child.stdout.readline()))

        yield execute
        child.stdin.close()


@pytest.fixture(scope="module")
def results(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs a command line that must succeed, in folders of its own unless others are given; gives its result."""

    def execute(*arguments: str, cache: Path | None = None) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("runs")
        code, said = command(*arguments, f"runs_root={folder}", f"cache_root={cache or folder}")
        assert code == 0, said
        return json.loads(next(folder.glob("*/*/result.json")).read_text())

    return execute


@pytest.mark.slow
def test_everything_by_name_then_out_of_the_caches_then_as_pushed(hub, results, tmp_path) -> None:
    """The commit that was read makes the key and is in the result; nothing is asked for twice in a run."""
    before = len(hub.asked)
    first = results(*FULL, cache=tmp_path)
    asked = hub.asked[before:]
    commits = {name: commit_of("main", revisions["main"]) for name, revisions in hub.repositories.items()}
    assert first["provenance"] == {
        "model.path": {"source": "org/tiny", "revision": commits["models/org/tiny"]},
        "data.path": {"source": "vicgalle/alpaca-gpt4", "revision": commits["datasets/vicgalle/alpaca-gpt4"]},
        "prune.text": {"source": "c4", "revision": commits["datasets/allenai/c4"]},
        "eval.perplexity.text": {"source": "wikitext", "revision": commits["datasets/Salesforce/wikitext"]},
    }
    scores = first["eval"]["tasks"]
    assert scores["arc_easy"]["commit"] == commits["datasets/allenai/ai2_arc"]
    assert scores["rte"]["commit"] == commits["datasets/nyu-mll/glue"]
    assert asked.count("HEAD /datasets/nyu-mll/glue/resolve/main/README.md") == 1, "all models are scored on the same"
    assert asked.count("GET /api/models/org/tiny") == 1
    with hub.away():  # texts that are streamed are in no cache but that of the tokens
        again = results(*FULL, cache=tmp_path)
    assert again["key"] == first["key"] and again["eval"] == first["eval"]
    hub.add("models/org/tiny", hub.repositories["models/org/pushed"]["main"])
    pushed = results(*FULL, cache=tmp_path)
    assert pushed["key"] != first["key"] and pushed["baselines"] != first["baselines"]
    pinned = results(*FULL, f"model.revision={commits['models/org/tiny']}", cache=tmp_path)
    assert pinned["key"] == first["key"]


@pytest.mark.slow
def test_a_finished_run_is_known_by_its_commits(hub, command, tmp_path) -> None:
    overrides = [*PLAIN, "model.path=org/pushed", f"runs_root={tmp_path}", f"cache_root={tmp_path}"]
    assert command(*overrides)[0] == 0
    before = len(hub.asked)
    assert "not repeated" in command(*overrides)[1]
    assert [request for request in hub.asked[before:] if "/org/" in request] == ["GET /api/models/org/pushed"]
    with hub.away():
        assert "not repeated" in command(*overrides)[1]


@pytest.mark.slow
def test_a_snapshot_is_what_the_hub_has(hub, command, results, tmp_path) -> None:
    overrides = [*FULL, "model.path=org/bin", "data.limit=3", f"cache_root={tmp_path}"]
    from_hub = results(*FULL, "model.path=org/bin", "data.limit=3")
    assert not any("commits" in request for request in hub.asked), "nobody has asked for a conversion to safetensors"
    assert command("snapshot", *overrides)[0] == 0
    root = tmp_path / "snapshots"
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin"}
    made = {file.name for file in (root / "models/bin").iterdir() if not file.name.startswith(".")}
    assert names <= made and not made - names - {"provenance.json", "manifest.json"}
    assert len(lines(root / "alpaca_gpt4/train.jsonl")) == 3 and len(lines(root / "c4/train.jsonl")) == 40
    with hub.away():
        code, printed = command("snapshot", *overrides)
        assert code == 0 and printed.count("whole; ") == 6
        for more in ("data.limit=4", "eval.held_out=1"):
            code, printed = command("snapshot", *overrides, more, "--verify")
            assert code == 2 and "train.jsonl is missing or too short" in printed
        from_snapshot = results(*overrides, cache=tmp_path)
    assert from_snapshot["key"] != from_hub["key"]
    for score in from_hub["eval"]["tasks"].values():
        score.pop("commit")
    assert from_snapshot["eval"] == from_hub["eval"] and from_snapshot["loss"] == from_hub["loss"]
    made, read = from_snapshot["provenance"], from_hub["provenance"]
    assert made["model.path"]["commit"] == read["model.path"]["revision"]
    assert made["data.path"]["commits"] == {"train.jsonl": read["data.path"]["revision"]}
    assert made["eval.perplexity.text"] == {"source": "wikitext"}, "which is that of the snapshot"


NO_MODEL = "no such folder or snapshot, and the Hub gave no usable"
NO_DATA = "no such file, and the data set on the Hub cannot be read:"
TEXT = ["model.path=org/tiny", "data=text"]


REFUSED = [
    (["model.path=org/none"], f"model.path=org/none: {NO_MODEL} config.json: there is no such repository"),
    (["model.path=org/login"], f"model.path=org/login: {NO_MODEL} config.json: it is gated: accept its terms"),
    (["model.path=org/terms"], f"model.path=org/terms: {NO_MODEL} config.json: it is gated: accept its terms"),
    (
        ["model.path=org/tiny", "model.revision=old"],
        "model.revision=old: org/tiny on the Hub: it has no such branch",
    ),
    (["model.path=org/tiny", f"model.revision={'a' * 40}"], f"model.revision={'a' * 40}: org/tiny on the Hub: it"),
    (["model.path=org/adapter"], "model.path=org/adapter: must be a whole model; adapter_config.json says it is"),
    (["model.path=org/integers"], "model.path=org/integers: model.layers.0.mlp.down_proj.weight of model.safet"),
    ([*TEXT, "data.path=org/none"], f"data.path=org/none: {NO_DATA} Dataset 'org/none' doesn't exist on the Hub"),
    ([*TEXT, "data.path=org/script"], f"data.path=org/script: {NO_DATA} Dataset scripts are no longer supported"),
    ([*TEXT, "data.path=org/script@old"], "data.path=org/script@old: the data set on the Hub cannot be read: it"),
    ([*TEXT, "data.path=vicgalle/alpaca-gpt4", "data.split=x"], "data.split=x: the data set vicgalle/alpaca-gpt4"),
]


@pytest.mark.slow
def test_what_the_hub_does_not_give_is_one_line(command, tmp_path) -> None:
    for overrides, said in REFUSED:
        code, printed = command(*PLAIN, *overrides, f"runs_root={tmp_path}", f"cache_root={tmp_path}")
        assert code == 2 and printed.startswith(f"error: {said}") and printed.count("\n") == 1, printed


@pytest.mark.slow
def test_a_connection_that_is_lost_is_one_line_and_the_download_goes_on(hub, command, tmp_path) -> None:
    overrides = [*PLAIN, "model.path=org/slow", f"runs_root={tmp_path}", f"cache_root={tmp_path}"]
    hub.add("models/org/slow", hub.repositories["models/org/pushed"]["main"])
    hub.cut = ("model.safetensors",)
    code, printed = command(*overrides)
    hub.cut = ()
    lost = f"{NO_MODEL} weights: the connection to it was lost; the same command continues the download"
    assert code == 2 and printed == f"error: model.path=org/slow: {lost}\n"
    assert command(*overrides)[0] == 0
    with hub.away():
        code, printed = command(*PLAIN, "model.path=org/unread", f"runs_root={tmp_path}", f"cache_root={tmp_path}")
        assert code == 2 and f"{NO_MODEL} config.json: it cannot be reached" in printed
        assert "; python -m harness.snapshot, with the overrides" in printed
