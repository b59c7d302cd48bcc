"""The library alone: importing and using it takes torch, transformers and peft, nothing of the bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import lors

ROOT = Path(__file__).parents[1]
BENCH = ("hydra", "omegaconf", "lm_eval", "datasets", "pandas", "matplotlib", "pytest", "hypothesis", "ruff")

# An entry None in sys.modules is an absent module: importing it fails, and looking for it finds nothing. So
# transformers and peft, which look before they use an optional library, behave as where it was never installed.
# What `import lors` adds is counted after them, for they bring in much themselves (accelerate, for one).
PROGRAM = f"""
import sys
for name in {BENCH}:
    sys.modules[name] = None

import importlib.util, json
found = [name for name in {BENCH} if importlib.util.find_spec(name)]

import torch, peft, transformers
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
before = set(sys.modules)
import lors
added = sorted(set(sys.modules) - before)

shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained("base")
model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), lors.LorsConfig(r=2, task_type="CAUSAL_LM"))
ids = torch.arange(12).view(2, 6)
lors.initialize(model, [{{"input_ids": ids, "labels": ids}}])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(2):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
model.save_pretrained("adapter")
merged = AutoPeftModelForCausalLM.from_pretrained("adapter").merge_and_unload()
own = sorted(name for name in sys.modules if name.partition(".")[0] in ("lors", "harness", "baselines", "analysis"))
print(json.dumps(dict(found=found, added=added, own=own, merged=type(merged).__name__)))
"""


def test_a_model_is_tuned_with_the_bench_absent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # a starved machine needs minutes to import transformers
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["found"] == [], "the bench is not absent"
    # The import adds only the library; torch imports some of its own modules only when they are asked for.
    packages = {name.partition(".")[0] for name in report["added"]}
    assert packages - set(sys.stdlib_module_names) - {"torch"} == {"lors"}
    assert "lors.tuner" in report["own"]
    bench = ("harness", "baselines", "analysis")
    assert not [name for name in report["own"] if name.startswith(bench)]
    assert report["merged"] == "LlamaForCausalLM"


def test_the_version_is_that_of_the_package() -> None:
    assert lors.__version__ == version("lors")


def test_the_wheel_is_the_library_and_nothing_of_the_bench() -> None:
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    find = settings["packages"]["find"]
    packages = set(setuptools.find_packages(str(ROOT), include=find["include"]))
    assert packages == {"lors", "lors.kernels", "lors.pruning"}
    data = {
        str(file.relative_to(ROOT / package.replace(".", "/")))
        for package in packages
        for file in (ROOT / package.replace(".", "/")).glob("*.*")
        if file.suffix != ".py"
    }
    assert data == {name for names in settings["package-data"].values() for name in names}
