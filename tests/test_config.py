"""Every file in ``conf``: it composes, resolves, and opens with the command that runs it."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from harness.config import resolve
from harness.errors import BadInput

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")
OPTIONS = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))
# Options that want a path, and options that go together.
NEEDS = {
    ("model", "hf"): ["model.path=a/model"],
    ("data", "text"): ["data.path=a/corpus"],
    ("prune", "none"): ["sparsity=0"],
}
# Published sizes; the head is counted, as none of these ties it to the embeddings.
PARAMETERS = {
    "tinyllama_1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_resolves(composed, group: str, option: str) -> None:
    cfg = resolve(composed(f"{group}={option}", *NEEDS.get((group, option), [])))
    assert not OmegaConf.missing_keys(cfg)
    if group not in ("experiment", "launch") and not (group == "prune" and option == "none"):
        expected = "a/model".rpartition("/")[2] if option == "hf" else option
        assert cfg[group].get("name", option) == expected, "the name of an option is that of its file"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_opens_with_a_command_that_composes(composed, group: str, option: str) -> None:
    """The first comment is a complete command line that uses the option."""
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    opening = next(line for line in lines if not line.startswith("# @package"))
    command = re.fullmatch(r"# python run\.py (.*)", opening)
    assert command, opening
    overrides = [word.replace("<a", "a").replace(">", "") for word in command[1].split() if "=" in word]
    assert f"{group}={option}" in overrides or option in ("default", "microworld", "wanda", "lors", "python")
    if group == "experiment" and option not in ("smoke", "real"):
        assert command[1] == f"-m experiment={option}", "a preset is a complete command"
    if not any("," in override for override in overrides):
        composed(*overrides)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_model_shapes_have_the_published_size(composed, name: str) -> None:
    shape = OmegaConf.to_container(composed(f"model={name}").model.shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_help_is_quick_and_names_groups_and_keys() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for group in GROUPS:
        assert f"\n{group}: " in run.stdout
    for name in ("sparsity:", "pattern:", "learning_rate:", "data_root:", "targets:", "method=lors sparsity=0.5"):
        assert name in run.stdout
    # Processor time, because the clock depends on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_run_py_imports_nothing_heavy_before_the_command_line_is_parsed() -> None:
    code = "import sys, run; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lors')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_in_conf_depends_on_the_machine() -> None:
    """Keys of runs would differ from user to user: no environment variable, no absolute path."""
    for file in CONF.rglob("*.yaml"):
        values = re.sub(r"#.*", "", file.read_text())
        assert "oc.env" not in values and os.path.expanduser("~") not in values, file


def test_there_are_not_more_processes_than_gpus(composed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without one would only say that a device ordinal is invalid."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    cfg = composed("launch=torchrun", "launch.processes=2")
    for gpus in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        resolve(cfg)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match=r"^launch\.processes=2: must be at most 1, the GPUs of this machine"):
        resolve(cfg)
