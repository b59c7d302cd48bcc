"""Which jobs a sweep has: the blocks of a preset, what the command line replaces, and every preset of ``conf``."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import composed_by_hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from harness.blocks import composing_once, expand
from harness.config import resolve
from harness.method_from_config import build_method

ROOT = Path(__file__).parents[1]
METHODS = sorted(file.stem for file in (ROOT / "conf" / "method").glob("*.yaml"))
ONE_ROW = "real"  # the only preset that is no sweep
EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))


def hydra(*overrides: str) -> tuple[OverridesParser, DictConfig]:
    """Hydra's parser, which knows the groups of ``conf``, and the config of a preset with Hydra's own part."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
        return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()), cfg


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=spp", "adapter.r=4", "adapter={alpha:8}"],
        ["model=hf", "model.path=x", "eval=gsm8k", "+launch.more=3"],
        ["experiment=zero_shot", "method=lora", "prune=none", "sparsity=0", "seed=1"],
    ],
)
def test_options_that_are_composed_once_give_what_hydra_composes(composed, overrides: list[str]) -> None:
    """Of a sweep, and of these tests, which put some of it together themselves."""
    expected = OmegaConf.to_yaml(composed_by_hydra(*overrides))
    groups = {folder.name for folder in (ROOT / "conf").iterdir()}
    once = composing_once(lambda options: composed_by_hydra(*options), groups)
    for compose_ in (once, once, lambda words: composed(*words)):
        assert OmegaConf.to_yaml(compose_(overrides)) == expected
    with pytest.raises(HydraException, match=r"adapter\.rank"):
        once(["adapter.rank=3"])


@pytest.fixture(scope="module")
def parser() -> OverridesParser:
    return hydra()[0]


def jobs_of(experiment: str, *overrides: str) -> list[list[str]]:
    """The overrides of the jobs of ``run.py -m experiment=<experiment>``."""
    parser, cfg = hydra(f"experiment={experiment}", *overrides)
    assert cfg.name == experiment, "results of different experiments do not mix"
    return expand(parser, cfg.hydra.sweeper.params, cfg.hydra.sweeper.blocks, [f"experiment={experiment}"])


def test_without_blocks_a_sweep_is_the_product_of_the_command_line(parser) -> None:
    jobs = expand(parser, {}, {}, ["method=lors,lora", "seed=0", "sparsity=0.5,0.7"])
    assert jobs == [
        [f"method={method}", "seed=0", f"sparsity={sparsity}"] for method in ("lors", "lora") for sparsity in (0.5, 0.7)
    ]


def test_a_sweep_is_the_products_of_its_blocks(parser) -> None:
    blocks = {
        "tuned": {"method": "lors,lora"},
        "dense": {"method": "lors", "prune": "none", "seed": 0},
        "without": None,
    }
    assert expand(parser, {"seed": "0,1"}, blocks, ["adapter.r=8"]) == [
        ["seed=0", "method=lors", "adapter.r=8"],
        ["seed=0", "method=lora", "adapter.r=8"],
        ["seed=1", "method=lors", "adapter.r=8"],
        ["seed=1", "method=lora", "adapter.r=8"],
        ["seed=0", "method=lors", "prune=none", "adapter.r=8"],
    ]


def test_the_command_line_replaces_axes_and_what_a_block_is_about_stays(parser) -> None:
    blocks = {"tuned": {"method": "lors,lora"}, "dense": {"method": "lors", "sparsity": 0}}
    assert expand(parser, {"seed": "0,1", "sparsity": 0.5}, blocks, ["seed=7", "method=spp", "sparsity=0.6,0.7"]) == [
        ["seed=7", "sparsity=0.6", "method=spp"],
        ["seed=7", "sparsity=0.7", "method=spp"],
        ["seed=7", "sparsity=0", "method=lors"],
    ]
    with pytest.raises(HydraException, match="method=spp: every block of the sweep sets method itself"):
        expand(parser, {}, {"dense": {"method": "lors"}}, ["method=spp"])


def test_one_row_of_the_real_table_is_the_one_of_its_sweep(composed) -> None:
    """The same run, in the same folder."""
    row = ("method=lors", "sparsity=0.6", "seed=1")
    one, of_sweep = (resolve(composed(f"experiment={preset}", *row)) for preset in ("real", "real_zero_shot"))
    assert one == of_sweep and one.name == "real_zero_shot"


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name != ONE_ROW])
def test_the_jobs_of_every_experiment_are_valid(composed, experiment: str) -> None:
    """Every value of every axis is in a job that resolves and builds; test_inputs builds the methods one by one."""
    jobs = jobs_of(experiment)
    assert len(jobs) > 1, "a complete command, without axes to add"
    seen = {f"method={option}" for option in METHODS}
    for job in jobs:
        if not set(job) <= seen:
            seen |= set(job)
            build_method(resolve(composed(*job)))


@pytest.mark.parametrize(
    "experiment", ["zero_shot", "sparsity_sweep", "rank_sweep", "ablation_lors", "all_methods", "prune_seeds"]
)
def test_quality_tables_carry_their_controls(experiment: str) -> None:
    jobs = [set(job) for job in jobs_of(experiment)]
    dense = [job for job in jobs if {"prune=none", "sparsity=0"} <= job]
    assert sum("method=none" in job for job in dense) == 1
    assert {tuple(job & {"seed=0", "seed=1", "seed=2"}) for job in dense if "method=lors" in job} == {
        ("seed=0",), ("seed=1",), ("seed=2",)
    }  # fmt: skip
    settings = [{o for o in job if o.startswith(("prune=", "sparsity=", "pattern="))} for job in jobs]
    pruned = [setting for job, setting in zip(jobs, settings, strict=True) if "method=none" in job]
    assert all(setting in pruned for setting in settings), "pruned only, for every pruned model"


def test_all_methods_lets_the_zeros_go_where_a_method_can() -> None:
    able = {
        option
        for option in METHODS
        if "keep_zeros" in yaml.safe_load((ROOT / "conf" / "method" / f"{option}.yaml").read_text()).get("peft", {})
    }
    lost = [job for job in map(set, jobs_of("all_methods")) if "method.peft.keep_zeros=False" in job]
    assert {override for job in lost for override in job if override.startswith("method=")} == {
        f"method={name}" for name in able
    }
