"""Bad input: one line that names the key, the value and what is allowed, before any work (see `bad_inputs`)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from bad_command_lines import ARGUMENTS, COMPOSED
from bad_inputs import IN_PROCESS, Bad
from bad_models import MODELS
from conftest import compose_config
from omegaconf import DictConfig

from harness import feasible
from harness import run as harness_run
from harness.errors import BadInput
from harness.run import execute

ROOT = Path(__file__).parents[1]


def composed_config(model: Path, sources: Path, overrides: list[str]) -> DictConfig:
    """The config of a run that could be made in any folder, but for the given overrides."""
    text = f"{sources}/text.jsonl"
    keys = {
        **{"model": "hf", "data": "alpaca", "eval": "zeroshot", "model.path": model, "prune.text": text},
        **{"data.path": f"{sources}/instructions.jsonl", "prune.sequence_length": 32, "prune.samples": 4},
        **{"eval.data_root": sources, "eval.tasks": "[rte]", "eval.perplexity": f"{{text:{text},window:16}}"},
        **{"adapter.r": 4, "train.steps": 2, "runs_root": "results", "cache_root": "cache"},
    }
    chosen = {word.partition("=")[0] for word in overrides}
    good = (f"{key}={value}" for key, value in keys.items() if not chosen & {key, key.partition(".")[0]})
    return compose_config(*good, *overrides)


@pytest.fixture
def looking(tmp_path, monkeypatch) -> Callable[[Bad], None]:
    """Function that makes the machine that of an entry, on which no weights are loaded and no run begins."""

    def only_names(*arguments: object, **options: object) -> object:
        assert options.get("device_map") == "meta", "weights were loaded before the input was checked"
        return load(*arguments, **options)

    def at_work(*_: object, **__: object) -> None:
        raise AssertionError("accepted")

    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", only_names)
    monkeypatch.setattr(harness_run, "_attempt", at_work)
    monkeypatch.setattr(subprocess, "run", at_work)
    monkeypatch.chdir(tmp_path)

    def machine(bad: Bad) -> None:
        for name, value in bad.environment.items():
            monkeypatch.setenv(name, value)
        if bad.free is not None:
            monkeypatch.setattr(feasible, "available_memory", lambda: bad.free)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return machine


def prepare(bad: Bad, here: Path, model: Path, sources: Path) -> tuple[list[str], list[str]]:
    """Write the files of an entry; returns its words and the parts of the answer, with their folders."""
    if bad.model is not None:
        shutil.copytree(model, here / "model")
        for change in bad.model:
            change(here / "model")
    for name, content in bad.files.items():
        target = here / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            target.mkdir()
        else:
            target.write_bytes(content if isinstance(content, bytes) else content.encode())

    def placed(text: str) -> str:
        return text.replace("{here}", str(here)).replace("{sources}", str(sources)).replace("{model}", str(model))

    return [placed(word) for word in bad.given], [placed(part) for part in bad.says]


def files_in(folder: Path) -> set[Path]:
    """What lies in a folder, without the cache, which may keep tokens that others can use."""
    return {path for path in folder.rglob("*") if "cache" not in path.parts}


def parametrized(corpus: list[Bad]) -> pytest.MarkDecorator:
    slow = pytest.mark.slow
    return pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name, marks=[slow] * bad.slow) for bad in corpus])


@parametrized(IN_PROCESS + MODELS)
def test_a_run_is_refused_before_any_work(looking, tiny_checkpoint, tiny_sources, tmp_path, capsys, bad: Bad) -> None:
    given, says = prepare(bad, tmp_path, tiny_checkpoint, tiny_sources)
    looking(bad)
    before = files_in(tmp_path)
    cfg = composed_config(tiny_checkpoint, tiny_sources, given)
    with pytest.raises(BadInput) as refusal:
        execute(cfg)
    check_answer(str(refusal.value), says)
    assert files_in(tmp_path) == before, "a refused run leaves nothing"
    assert capsys.readouterr().out == ""


@parametrized(ARGUMENTS + COMPOSED)
def test_a_command_line_is_answered_with_one_line_and_exit_code_2(
    looking, command_line, tiny_checkpoint, tiny_sources, tmp_path, capsys, bad: Bad
) -> None:
    given, says = prepare(bad, tmp_path, tiny_checkpoint, tiny_sources)
    looking(bad)
    before = files_in(tmp_path)
    assert command_line(given) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.endswith("\n")
    check_answer(printed.err.removeprefix("error: ").removesuffix("\n"), says)
    assert files_in(tmp_path) == before, "a refused run leaves nothing"


def check_answer(message: str, says: list[str]) -> None:
    assert not any(character in message for character in "\n\r\t\0"), "one line"
    assert message.startswith(says[0]), message
    for part in says:
        assert part in message


@pytest.fixture
def command_line(monkeypatch) -> Callable[[list[str]], int]:
    """Function from arguments of run.py to its exit code, without a process of its own."""

    def main(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        try:
            return module.main()
        except SystemExit as end:
            return end.code

    module = run_module()
    monkeypatch.setitem(sys.modules, "run", module)
    monkeypatch.delenv("LORS_JOB", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    return main


@cache
def run_module() -> ModuleType:
    specification = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
