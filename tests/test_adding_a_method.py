"""The two methods of docs/adding_a_method.md: found by run and table without a change to any other file."""

import re
from pathlib import Path

import pytest
import yaml
from test_harness_run import tiny_overrides

from analysis import results, tables
from harness.run import execute

PAGE = (Path(__file__).parents[1] / "docs/adding_a_method.md").read_text()
BLOCKS = dict(re.findall(r"```(python|yaml)\n(.*?)```", PAGE, flags=re.DOTALL))


@pytest.fixture
def methods(tmp_path, monkeypatch) -> Path:
    """A folder as ``--config-dir`` takes it, with both methods, outside of the checkout."""
    loha = yaml.safe_load(BLOCKS["yaml"])
    unit_lora = {key: value for key, value in loha.items() if key != "keep_zeros"} | {"name": "unit_lora"}
    peft = unit_lora["peft"] | {"_target_": "unit_lora.UnitLoraConfig"}
    unit_lora["peft"] = {key.replace("alpha", "lora_alpha"): value for key, value in peft.items()}
    (tmp_path / "conf/method").mkdir(parents=True)
    for method in (loha, unit_lora):
        (tmp_path / f"conf/method/{method['name']}.yaml").write_text(yaml.safe_dump(method))
    (tmp_path / "unit_lora.py").write_text(BLOCKS["python"])
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "conf"


def test_the_page_has_at_most_50_lines() -> None:
    assert len(PAGE.splitlines()) <= 50


def test_both_have_their_rows_and_keep_the_zeros_or_not(
    methods, composed, tiny_checkpoint, tiny_sources, tmp_path
) -> None:
    common = tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path)
    common += [f"hydra.searchpath=[file://{methods}]", "eval.tasks=[rte]", "eval.perplexity=null"]
    for method in ("loha", "unit_lora"):
        assert execute(composed(*common, f"method={method}"))["status"] == "ok"
    found = results.load([tmp_path / "runs"])
    assert found.set_index("method").zeros_kept["unit_lora"] == 1
    named = {row.label for table in tables.build(found) for row in table.rows}
    for label in ("unit_lora", "loha", "loha, re-masked"):
        assert any(label in name for name in named), named
