"""Hydra's view of a sweep: which jobs it has (`conf/hydra/sweeper/blocks.yaml`), and who launches them.

Hydra's own sweeper makes one full product. A table with its controls is several: all methods on pruned models, and a
few on the dense one. Here a sweep is a list of blocks, each a product. Which of the jobs are run, and what happens
when one is interrupted, is the business of `harness.sweep`; every launcher of Hydra can carry them out.

Hydra executes all modules of `hydra_plugins` at every start (also those that are imported already, so their classes
are not to be caught by name elsewhere). The suite is therefore imported only when a sweep begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from harness.blocks import composing_once, expand

__all__ = ["SINCE", "BlockSweeper", "as_list", "expand", "is_local"]

# The jobs of a sweep find here when it began, see `harness.store.RunStore.written_since`.
SINCE = "LORS_SWEEP"
FAILED = 1  # exit code of a sweep in which not all went well
# Launchers whose jobs run on this machine, with its files and its memory.
LOCAL = ("basic", "joblib", "submitit_local")


class BlockSweeper(Sweeper):
    """Runs the jobs of all blocks.

    Args:
        params: Key -> values, for every block; None: no keys.
        blocks: Name -> key -> values; a block that is None is left out, and all are if this is None.
    """

    def __init__(self, params: Mapping[str, Any] | None, blocks: Mapping[str, Mapping[str, Any] | None] | None) -> None:
        self.params = params
        self.blocks = blocks

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[int]:
        """Called by Hydra with the overrides of the command line; returns the exit codes of the jobs.

        Raises:
            HydraException: A value or an input that is not allowed, before any job is started; or a folder that takes
                no file.
            SystemExit: A job did not end well.
        """
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        compose = composing_once(self._compose, loader.list_groups(""))
        composed = [(job, compose(job)) for job in expand(parser, self.params, self.blocks, arguments)]
        if "HF_HUB_OFFLINE" not in os.environ and all(is_local(cfg) for _, cfg in composed):
            os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

        from harness.errors import BadInput
        from harness.inputs import check_inputs
        from harness.sweep import begin, plan, run

        try:
            jobs = plan(composed)
            if self.config.hydra.runtime.choices["hydra/launcher"] in LOCAL:
                check_inputs((job.overrides, job.cfg) for job in jobs if job.store.finished(job.cfg) is None)
            since = begin(Path(self.config.hydra.sweep.dir), OmegaConf.to_yaml(self.config))
            os.environ[SINCE] = str(since)
            codes = run(jobs, self._launch, since)
        except BadInput as error:
            raise HydraException(str(error)) from error
        finally:
            os.environ.pop(SINCE, None)
        failed = sum(code != 0 for code in codes)
        if failed:
            verdict = f"{failed} of {len(jobs)} jobs did not end well; the same command tries them again"
            print(f"error: the sweep is over, but {verdict}", file=sys.stderr)
            raise SystemExit(FAILED)
        return codes

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    def _launch(self, jobs: Sequence[Sequence[str]]) -> list[int]:
        """Exit codes of the jobs, which Hydra's launcher runs one by one, in parallel, or on a cluster.

        Raises:
            SystemExit: The launcher gave up, as those of clusters do when one of their jobs is killed.
        """
        try:
            returned = self.launcher.launch(list(jobs), initial_job_idx=0)
        except HydraException:
            raise
        except Exception as error:  # every launcher has its own
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            verdict = "other jobs may still be at work, and the same command continues"
            print(f"error: the launcher gave up ({reason}); {verdict}", file=sys.stderr)
            raise SystemExit(FAILED) from error
        return [job.return_value for job in returned]


def is_local(cfg: DictConfig) -> bool:
    """Whether a run reads nothing from the Hub, as far as its composed config says, which is not checked yet."""

    def here(key: str) -> bool:
        source = OmegaConf.select(cfg, key)
        return source in (None, "microworld") or os.path.exists(os.path.expanduser(str(source)))

    try:
        if OmegaConf.select(cfg, "mode") in ("profile", "simulate"):
            return OmegaConf.select(cfg, "model.shape") is not None or here("model.path")
        folder = OmegaConf.select(cfg, "eval.data_root") is not None
        tasks = as_list(OmegaConf.select(cfg, "eval.tasks"))
        wikitext = folder and OmegaConf.select(cfg, "eval.perplexity.text") == "wikitext"
        # Without a text, activations of any model but the embedded one are calibrated on C4.
        text, samples = OmegaConf.select(cfg, "prune.text"), OmegaConf.select(cfg, "prune.samples")
        c4 = text is None and samples != 0 and OmegaConf.select(cfg, "model.path") != "microworld"
        return (
            (folder or all(str(task).startswith("microworld_") for task in tasks))
            and (wikitext or here("eval.perplexity.text"))
            and not c4
            and all(map(here, ("model.path", "data.path", "prune.text")))
        )
    except (OmegaConfBaseException, ValueError):  # a reference to nothing; a null character
        return True


def as_list(value: object) -> list:
    """The entries of a list in the config; of anything else none, its check comes later."""
    return list(value) if OmegaConf.is_list(value) else []
