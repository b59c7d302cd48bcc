"""The scripts and the notebook under ``examples/`` run as they are, on a small model, and leave what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from transformers import AutoModelForCausalLM

import lors
from lors.blocks import decoder_linears

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.slow


def run(*words: object) -> str:
    """What a command prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"}  # as accelerate launch --cpu sets it
    done = subprocess.run(map(str, words), env=environment, capture_output=True, text=True, timeout=600, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def zeros(folder: Path) -> lors.sparsity.Check:
    return lors.check(AutoModelForCausalLM.from_pretrained(folder))


def test_trainer(tiny_checkpoint, tmp_path) -> None:
    assert "sparsity 0.5" in run(sys.executable, "trainer.py", tiny_checkpoint, tmp_path)
    pruned, merged = zeros(tmp_path / "pruned"), zeros(tmp_path / "merged")
    assert merged["layers"] == pruned["layers"] and merged["sha256"] == pruned["sha256"]
    assert PeftConfig.from_pretrained(tmp_path / "adapter").support["sha256"] == pruned["sha256"]


def test_a_quantised_base(tiny_checkpoint, tmp_path) -> None:
    assert "sparsity 0.5" in run(sys.executable, "quantized.py", tiny_checkpoint, tmp_path)
    before, after = (
        lors.load_quantized(AutoModelForCausalLM.from_pretrained(tmp_path / name), tmp_path / name)
        for name in ("quantized", "merged")
    )
    assert lors.check(after)["sparsity"] >= lors.check(before)["sparsity"]  # a code may come to be that of zero
    layers = {name: (layer, after.get_submodule(name)) for name, layer in decoder_linears(before).items()}
    grids = [(old.packed.parts[0], new.packed.parts[0]) for old, new in layers.values()]
    assert all(torch.equal(old, new) for old, new in grids)
    assert any(not torch.equal(old.packed.parts[1], new.packed.parts[1]) for old, new in layers.values())
    assert all((new.weight[old.weight == 0] == 0).all() for old, new in layers.values())


def test_trl(tiny_checkpoint, tmp_path) -> None:
    pytest.importorskip("trl")
    assert "pattern 2:4" in run(sys.executable, "trl_sft.py", tiny_checkpoint, tmp_path)
    for start in ("random_start", "gradient_start"):
        assert PeftConfig.from_pretrained(tmp_path / start).support["pattern"] == "2:4"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loop_with_accelerate(tiny_checkpoint, tmp_path, processes: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    printed = run(*launcher, "accelerate_loop.py", tiny_checkpoint, tmp_path)
    assert "sparsity before 0.5000, after 0.5000" in printed
    assert printed.count("step 10, loss") == 1
    assert PeftConfig.from_pretrained(tmp_path / "adapter").peft_type == "LORS"


def test_several_adapters(tiny_checkpoint, tmp_path) -> None:
    *answers, compiled = run(sys.executable, "adapters.py", tiny_checkpoint, tmp_path).splitlines()
    texts = dict(line.split(": ", 1) for line in answers)
    assert list(texts) == ["one", "other", "both", "none", "one and none"]
    mixed = eval(texts["one and none"])
    assert mixed == [eval(texts["one"])[0], eval(texts["none"])[1]]
    assert float(compiled.split()[-2]) < 1e-4


def test_the_notebook_shows_what_its_text_says(tmp_path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "prune_to_plot.ipynb", 4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": EXAMPLES}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    loss = dict(re.findall(r"^(.+): loss ([\d.]+)", printed, re.MULTILINE))
    order = ["sparsity 0.50", "LoRA, merged", "LoRA, zeros put back", "sparsity 0.70"]
    assert [float(loss[name]) for name in order] == sorted(float(loss[name]) for name in order)
    assert float(loss["LoRS"]) < float(loss["LoRA, zeros put back"])
    assert re.search(r"LoRS: .* sparsity 0\.70", printed) and re.search(r"LoRA, merged: .* sparsity 0\.00", printed)
    assert "image/png" in outputs[-1]["data"]
