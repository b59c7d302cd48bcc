"""The method that docs/adding_a_method.md adds: found by run, sweep and table without a change to any other file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import results, tables

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(python|yaml)\n(.*?)```", (ROOT / "docs/adding_a_method.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep over the new method and the pruned model, with files that lie outside of the checkout."""
    folder = tmp_path_factory.mktemp("method")
    (folder / "block_scale.py").write_text(dict(BLOCKS)["python"])
    (folder / "conf/method").mkdir(parents=True)
    (folder / "conf/method/block_scale.yaml").write_text(
        dict(BLOCKS)["yaml"].replace("baselines.block_scale", "block_scale")
    )
    command = [sys.executable, ROOT / "run.py", "-m", f"--config-dir={folder / 'conf'}", "experiment=smoke"]
    options = [
        "method=block_scale",
        "adapter.r=8",
        "eval.tasks=[microworld_rte]",
        "eval.perplexity=null",
        f"runs_root={folder}/runs",
        f"cache_root={folder}/cache",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    run = subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder / "runs"


def test_the_two_files_have_fewer_than_60_lines() -> None:
    assert [language for language, _ in BLOCKS] == ["python", "yaml"]
    assert sum(len(text.splitlines()) for _, text in BLOCKS) < 60


def test_the_zeros_are_kept(swept: Path) -> None:
    rows = results.load([swept])
    row = rows[rows.method == "block_scale"].iloc[0]
    assert row.status == "ok"
    assert row.zeros_after == pytest.approx(0.5, abs=1e-3)
    assert row.trainable == 4 * 8 * (6 * 256 + 688)  # four blocks, r rows, six inputs of 256 and one of 688


def test_the_table_has_a_row_for_it(swept: Path) -> None:
    named = {row.label for table in tables.build(results.load([swept])) for row in table.rows}
    assert any("block_scale" in name for name in named), named
