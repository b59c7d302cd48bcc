"""Keys: what makes two runs the same run, over time too."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import compose_config
from omegaconf import DictConfig, OmegaConf
from test_experiments import jobs_of

from analysis.parquet_file import results_of
from harness import identity, microworld
from harness.config import resolve
from harness.identity import digest, fingerprint, local_path, run_key, version_of
from lors.pruning import PRUNERS

REFERENCE = Path(__file__).parents[1] / "runs" / "reference"
# What value_search has found became the default afterwards: their runs are of other choices.
SINCE_CHANGED = {
    ("lr_search", "rm_lora"),
    ("value_search", "rm_lora"),
    ("value_search", "xgblora"),
}


@cache
def resolved(*overrides: str) -> DictConfig:
    return resolve(compose_config(*overrides))


def key(*overrides: str) -> str:
    """The key of the run of these overrides."""
    return run_key(resolved(*overrides))


# The rate of another method is among them, what a null stands for, and a class: a method enters by its name.
OF_NO_NUMBER = (
    "force=true name=other runs_root=/elsewhere cache_root=/elsewhere save_merged=true launch=torchrun only=failed "
    "save_base=true train.tuned.sqft=0.1 train.checkpoint_every=7 train.report_to=[] +method.version=1 "
    "method._target_=my.Method adapter.alpha=16.0 sparsity=0.5 prune.text=microworld"
).split()
CHOSEN = (
    "seed=1 sparsity=0.6 pattern=2:4 method=lora prune=magnitude prune.seed=1 adapter.r=8 train.steps=151 "
    "method.peft.exact_gradient=true train.epochs=1 eval.limit=3 mode=profile data.loss_on=answer"
).split()


@pytest.mark.parametrize("override", OF_NO_NUMBER)
def test_what_cannot_change_the_numbers_is_not_in_the_key(override: str) -> None:
    assert key(override) == key()


@pytest.mark.parametrize("override", CHOSEN)
def test_what_can_change_the_numbers_is_in_the_key(override: str) -> None:
    assert key(override) != key()


def test_steps_do_not_count_once_epochs_replace_them() -> None:
    assert key("train.epochs=2", "train.steps=7") == key("train.epochs=2")


def test_a_pruner_does_not_count_where_nothing_is_pruned() -> None:
    assert key("sparsity=0") == key("sparsity=0", "prune=magnitude") == key("sparsity=0", "prune=none")


def test_a_profile_does_not_depend_on_data_scores_or_where_the_weights_would_be() -> None:
    profile = ["mode=profile", "model=llama2_7b"]
    assert key(*profile) == key(*profile, "data=alpaca", "eval=zeroshot", "model.path=my/copy")
    assert key(*profile) != key(*profile, "model.layers=2")


def test_keys_follow_the_content_of_local_sources_not_their_place(tmp_path: Path) -> None:
    here, there, other = (tmp_path / name for name in ("here.jsonl", "there.jsonl", "other.jsonl"))
    here.write_text('{"text": "one"}\n')
    there.write_text('{"text": "one"}\n')
    other.write_text('{"text": "two"}\n')
    keys = [key("data=text", f"data.path={file}") for file in (here, there, other)]
    assert keys[0] == keys[1] != keys[2]
    nested = [key(f"eval.perplexity.text={file}") for file in (here, there, other)]
    assert nested[0] == nested[1] != nested[2]


def test_fingerprint_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(b"\0" * 10)
    first = fingerprint(folder)
    folder.rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    (folder / "README.md").write_text("a model card says nothing about the numbers")
    (folder / ".hidden").write_text("nor does this")
    assert fingerprint(folder) == first
    (folder / "deep" / "weights").write_bytes(b"\0" * 9 + b"\1")
    assert fingerprint(folder) != first
    (folder / "deep" / "weights").write_bytes(b"\0" * 10)
    (folder / "deep" / "weights").rename(folder / "weights")
    assert fingerprint(folder) != first


def test_sources_on_this_machine_and_elsewhere(tmp_path: Path) -> None:
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path("owner/name") is None
    assert local_path(None) is None


def test_a_file_at_rest_is_read_once_and_a_changed_one_again(tmp_path: Path, monkeypatch) -> None:
    """A sweep asks for the fingerprint of a model once per job."""
    file, reads = tmp_path / "weights", []
    digest_of = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: reads.append(1) or digest_of(*arguments))
    file.write_bytes(b"one")
    young = fingerprint(file), fingerprint(file)
    assert len(reads) == 2, "a change within the same tick of the clock must be seen"
    os.utime(file, ns=(1, 1))
    assert {fingerprint(file), fingerprint(file), *young} == {young[0]} and len(reads) == 3
    file.write_bytes(b"two")
    os.utime(file, ns=(2, 2))
    assert fingerprint(file) != young[0]


def test_a_fix_changes_the_keys_of_what_it_fixes_and_no_others(monkeypatch) -> None:
    runs = ((), ("prune=sparsegpt",), ("prune=none",), ("mode=profile",), ("mode=simulate",))
    before = [key(*run) for run in runs]
    monkeypatch.setattr(identity, "VERSIONS", {**identity.VERSIONS, "prune.wanda": 2})
    assert [key(*run) == old for run, old in zip(runs, before, strict=True)] == [False, True, True, True, True]
    monkeypatch.setattr(identity, "VERSIONS", {**identity.VERSIONS, "prune.wanda": 1, "evaluate": 2})
    assert [key(*run) == old for run, old in zip(runs, before, strict=True)] == [False, False, False, True, True]
    assert key("+method.version=2") != key()


def test_a_new_option_changes_no_key_and_a_changed_default_meets_no_old_result(monkeypatch) -> None:
    cfg = resolved()
    before = run_key(cfg)
    monkeypatch.setattr(identity, "ABSENT", {**identity.ABSENT, "train.new": "off"})
    off, on = (OmegaConf.merge(cfg, {"train": {"new": value}}) for value in ("off", "on"))
    # Whatever conf says now: absence means what it meant.
    assert run_key(off) == before != run_key(on)


def test_a_text_is_what_is_in_it_whatever_its_suffix(tmp_path: Path) -> None:
    """A .md file in a model folder is documentation; a corpus that is one is not."""
    keys = []
    for content in ("one", "two"):
        (tmp_path / "corpus.md").write_text(content)
        keys.append((key("data=text", f"data.path={tmp_path}/corpus.md"), fingerprint(tmp_path / "corpus.md")))
    assert keys[0][0] != keys[1][0] and keys[0][1] != keys[1][1]


# ---- the numbers of the stages: who changes what a stage makes raises its number, then renews the digest here


def test_the_microworld_is_that_of_its_number() -> None:
    made = {
        "texts": {split: microworld.texts(split) for split in ("calibration", "heldout")},
        "instructions": microworld.instruction_rows()[:500],
        "tasks": {task: [microworld.task_rows(task, split) for split in ("test", "validation")]
                  for task in microworld.TASKS},
    }  # fmt: skip
    assert (version_of("microworld"), digest(made)) == (1, "4bc0d63586039822")


PRUNED = {"magnitude": (1, "38db571aba8b0bdd"), "wanda": (1, "6c0e8f762c7ea1ae"), "sparsegpt": (1, "98ec3e0555632aff")}


@pytest.mark.parametrize("pruner", PRUNERS)
def test_what_a_pruner_keeps_is_that_of_its_number(pruner: str) -> None:
    torch.manual_seed(0)
    W, X = torch.randn(24, 32), torch.randn(200, 32) * torch.linspace(0.1, 3, 32)
    rule, statistic = PRUNERS[pruner]
    data = () if statistic is None else (statistic(X),)
    kept = [rule(W.clone(), *data, sparsity=0.5, pattern=pattern) != 0 for pattern in ("unstructured", "2:4")]
    assert (version_of(f"prune.{pruner}"), digest([M.tolist() for M in kept])) == PRUNED[pruner]


# ---- the committed runs


def committed() -> list[tuple[str, dict]]:
    """Experiment and result of every packed run."""
    return [(file.stem, result) for file in sorted(REFERENCE.glob("*.parquet")) for result in results_of(file)]


def key_of_config(result: dict) -> str:
    """The key that follows from the config that a run has recorded."""
    return run_key(OmegaConf.create(result["config"]))


def of_snapshots(result: dict) -> bool:
    """Whether a run has read what is not in this repository, of which its config holds fingerprints."""
    return str(result["config"]["model"]["path"]).startswith("sha256:")


def found(experiment: str, result: dict) -> bool:
    """Whether the command that made a run finds it today."""
    command = result["environment"]["command"]
    if "-m" in command:  # a sweep without processes, which noted its own command
        return result["key"] in keys_of_sweep(experiment)
    overrides = [word for word in command[1:] if "=" in word and not word.startswith("--")]
    return run_key(resolve(compose_config(*overrides))) == result["key"]


@cache
def keys_of_sweep(experiment: str) -> set[str]:
    return {run_key(resolve(compose_config(*job))) for job in jobs_of(experiment)}


def test_committed_runs_have_the_keys_of_their_configs() -> None:
    runs = [result for _, result in committed()]
    assert len(runs) > 700
    assert [result["key"] for result in runs[::30] if key_of_config(result) != result["key"]] == []


@pytest.mark.slow
def test_every_committed_run_has_the_key_of_its_config() -> None:
    assert [result["key"] for _, result in committed() if key_of_config(result) != result["key"]] == []


def test_committed_runs_are_found_by_their_commands() -> None:
    processes = [
        (experiment, result)
        for experiment, result in committed()
        if "simulated" not in experiment and (experiment, result["method"]) not in SINCE_CHANGED
        if not of_snapshots(result)
    ]
    assert len(processes) > 500
    assert [result["key"] for experiment, result in processes[::60] if not found(experiment, result)] == []


@pytest.mark.slow
def test_every_committed_run_is_found_by_its_command() -> None:
    missing = {(experiment, result["method"]) for experiment, result in committed()
               if not of_snapshots(result) and not found(experiment, result)}  # fmt: skip
    assert missing == SINCE_CHANGED


def test_idle_options_do_not_count_and_processes_do_where_each_draws(composed) -> None:
    def key(*words: str) -> str:
        return run_key(resolve(composed("method=lors", *words)))

    for idle in ("gradient_share=0.5", "gradient_until=0.5", "group=32"):
        assert key(f"method.peft.{idle}") == key()
    sampled, two = "method.peft.gradient=sampled", ("launch=torchrun", "launch.processes=2")
    assert len({key(), key(sampled), key(sampled, "method.peft.gradient_share=0.5"), key(sampled, *two)}) == 4
    assert key(*two) == key()


def test_without_a_shape_in_the_config_that_of_the_folder_is_in_the_key_of_a_profile(tmp_path: Path) -> None:
    """Two folders of one name are two models; what else lies in them is not read."""

    def of(place: str, layers: int, mode: str, **others: str) -> str:
        folder = tmp_path / place / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(f'{{"num_hidden_layers": {layers}}}')
        for name, text in others.items():
            (folder / name).write_text(text)
        return key("model=hf", f"model.path={folder}", f"mode={mode}")

    for mode in ("profile", "simulate"):
        assert of("a", 2, mode) == of("b", 2, mode, weights="some") != of("c", 3, mode)
        shaped = ("model=tinyllama_1b", f"mode={mode}")
        assert key(*shaped) == key(*shaped, f"model.path={tmp_path}/c/model")
