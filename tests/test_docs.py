"""README and docs: commands compose, links resolve, every method has its page, numbers are those of the runs."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from functools import partialmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml
from pruned_models import SHAPE, weights
from test_experiments import EXPERIMENTS, hydra
from transformers import LlamaConfig, LlamaForCausalLM

from analysis import results
from harness.config import resolve
from harness.identity import run_key
from harness.method_from_config import build_method
from hydra_plugins.block_sweeper import expand

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEADINGS = ["Idea", "Equation", "Cost", "Options", "Deviations from paper and code", "Result", "When to use it"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands() -> dict[str, list[str]]:
    """Every command of this project in a code block or in backticks -> its words after ``python``.

    test_adding_a_method.py runs those of the page that adds a method.
    """
    found = {}
    for page in PAGES:
        if page.name == "adding_a_method.md":
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        code = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE) + re.findall(r"`(python [^`]+)`", text)
        for line in "\n".join(code).splitlines():
            for command in line.split("&&"):
                match = re.search(r"\bpython ((?:-m |\w+/)?\w+.*)", command)
                if match and "<" not in command:
                    words = shlex.split(match[1], comments=True)
                    found[" ".join(words)] = words
    return found


COMMANDS = commands()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("run.py")])
def test_every_command_of_the_bench_composes(composed, monkeypatch, command: str) -> None:
    preset = re.fullmatch(r"run.py -m experiment=(\w+)", command)
    if preset:  # test_experiments.py tries all jobs of it
        assert preset[1] in EXPERIMENTS
        return
    words = [word for word in COMMANDS[command][1:] if word not in ("-m", "--help")]
    # Not every launcher and tracker is installed for the tests.
    monkeypatch.setattr("harness.config.find_spec", lambda _: find_spec("json"))
    launcher = [word for word in words if word.lstrip("+").startswith(("hydra/launcher", "hydra.launcher"))]
    words = [word for word in words if word not in launcher]
    if "-m" in COMMANDS[command]:
        parser, cfg = hydra(*[word for word in words if word.startswith(("experiment=", "hydra"))])
        overrides = [word for word in words if not word.startswith("hydra")]
        words = expand(parser, cfg.hydra.sweeper.params, cfg.hydra.sweeper.blocks, overrides)[-1]
    build_method(resolve(composed(*words)))


class ParsedError(Exception):
    """The arguments are in order."""


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("-m ")])
def test_the_arguments_of_every_other_command_parse(monkeypatch, command: str) -> None:
    def parse(parser: argparse.ArgumentParser, original: Callable, arguments: list[str] | None = None) -> None:
        original(parser, arguments)
        raise ParsedError

    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, partialmethod(parse, original))
    _, module, *arguments = COMMANDS[command]
    package = find_spec(module).submodule_search_locations
    with pytest.raises(ParsedError):
        import_module(f"{module}.__main__" if package else module).main(arguments)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / unquote(path)).resolve() if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("method", sorted(file.stem for file in (ROOT / "conf/method").glob("*.yaml")))
def test_every_method_has_a_page_in_the_fixed_shape(method: str) -> None:
    page = generate.page_of(method)
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == HEADINGS
    for heading, section in zip(HEADINGS, re.split(r"^## .*", text, flags=re.MULTILINE)[1:], strict=True):
        assert re.sub(r"<!--.*?-->", "", section).strip(), f"{heading}: empty"
    assert f"`method={method}`" in text
    assert f"methods/{page.name}" in str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def test_generated_blocks_are_up_to_date() -> None:
    stale = [name_of(page) for page in generate.out_of_date()]
    assert not stale, f"python docs/generate.py: {', '.join(stale)}"


def test_the_first_command_is_a_run_of_the_main_table(composed) -> None:
    line = README.read_text(encoding="utf-8").splitlines()[3]
    overrides = line.partition("python run.py ")[2].split()
    committed = results.load([generate.REFERENCE / "zero_shot.parquet"])
    assert run_key(resolve(composed(*overrides))) in set(committed.key)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_the_library_in_the_readme_prunes_tunes_saves_loads_and_merges(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    rows = (torch.arange(32)[:, None] + torch.arange(12)) % 64
    names = {"model": model, "token_ids": rows, "train_dataset": [{"input_ids": row, "labels": row} for row in rows]}
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(block, names)

    assert type(names["model"]) is LlamaForCausalLM
    before, after = weights(LlamaForCausalLM.from_pretrained("pruned")), weights(names["model"])
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert (before[name] == 0).float().mean() == pytest.approx(0.5, abs=0.01), name
        assert not weight[before[name] == 0].any(), name
        assert not torch.equal(weight, before[name]), name


def test_every_script_that_is_named_runs_from_the_root() -> None:
    scripts = [words[0] for words in COMMANDS.values() if words[0].endswith(".py")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)
