"""A corpus of bad inputs: what a user may give to a run, and what the one line of the answer must contain.

Every entry has the words of a command line, in which ``{here}`` is a folder of its own, ``{sources}`` and ``{model}``
are the good files that all other keys refer to. The parts that the answer must have name the key, the value or the
file, and what is allowed. `tests/test_bad_input.py` runs them all.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        stage: Where it is found.
        given: Overrides, or arguments of the command line.
        says: Parts of the answer.
        files: Files below ``{here}`` that are written first; None is a folder.
        model: Changes to a copy of the good model, which is ``{here}/model`` then.
        environment: Variables.
        free: Bytes of memory that the machine has; None: as it is.
        slow: Whether the answer takes seconds.
    """

    stage: str
    given: tuple[str, ...]
    says: tuple[str, ...]
    files: Mapping[str, str | bytes | None] = field(default_factory=dict)
    model: tuple[Change, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    free: int | None = None
    slow: bool = False

    @property
    def name(self) -> str:
        """What a test of it is called."""
        extra = ", ".join([*self.files, *(change.__name__ for change in self.model or ()), *self.environment])
        return ascii(" ".join([self.stage, *self.given, extra])).strip("'\"")[:150]


def entries(stage: str, *lines: tuple, **options: object) -> list[Bad]:
    """Entries of a stage from ``(words, part, part, ...)``; words in one text are apart by blanks."""
    words = (line[0].split() if isinstance(line[0], str) else line[0] for line in lines)
    return [Bad(stage, tuple(given), line[1:], **options) for given, line in zip(words, lines, strict=True)]


COUNT, PLACE = "must be a whole number >= 1", "must be a folder below runs_root"
NO_TEXT = "without line breaks and other control characters"

# One value of a key that is not of its type, or out of its range.
VALUES = entries(
    "value",
    ("mode=simulated", "mode=simulated: must be one of run, profile, simulate"),
    ("mode=null", "mode=null: must be one of run, profile, simulate"),
    ("seed=-1", "seed=-1: must be a whole number >= 0"),
    ("seed=4294967296", "seed=4294967296: must be a whole number >= 0 and <= 4294967295"),
    ("seed=1.0", "seed=1.0: must be a whole number >= 0"),
    ("seed=true", "seed=true: must be a whole number >= 0"),
    ("seed='0'", "seed=0: must be a whole number >= 0"),
    ("force=maybe", "force=maybe: must be true or false"),
    ("force=1", "force=1: must be true or false"),
    ("save_merged=null", "save_merged=null: must be true or false"),
    ("only=all", "only=all: must be one of failed, missing, or null"),
    ("sparsity=1", "sparsity=1: allowed is a number with 0 <= sparsity < 1"),
    ("sparsity=-0.1", "sparsity=-0.1: allowed is a number with 0 <= sparsity < 1"),
    ("sparsity=half", "sparsity='half': allowed is a number with 0 <= sparsity < 1"),
    ("sparsity=nan", "sparsity=nan: allowed is a number with 0 <= sparsity < 1"),
    ("sparsity=true", "sparsity=True: allowed is a number with 0 <= sparsity < 1"),
    ("sparsity=[0.5]", "sparsity=[0.5]: allowed is a number with 0 <= sparsity < 1"),
    ("pattern=4:2", "pattern='4:2': allowed are unstructured and 'n:m'"),
    ("pattern=0:4", "pattern='0:4': allowed are unstructured and 'n:m'"),
    ("pattern=2:4:8", "pattern='2:4:8': allowed are unstructured and 'n:m'"),
    ("pattern=null", "pattern=None: allowed are unstructured and 'n:m'"),
    ("pattern=24", "pattern=24: allowed are unstructured and 'n:m'"),
    ("name=../../x", "name=../../x: " + PLACE),
    ("name=/abs", "name=/abs: " + PLACE),
    ("name=a/../b", "name=a/../b: " + PLACE),
    ("name=a//b", "name=a//b: " + PLACE),
    ("name=.", "name=.: " + PLACE),
    ("name=3", "name=3: must be a text", "quotes inside quotes"),
    (["name=' '"], "name= : must be a text that is not blank"),
    (["name='a\nb'"], r"name=a\nb: must be a text", NO_TEXT),
    (["name='a\udcffb'"], r"name=a\udcffb: must be a text", NO_TEXT),
    ("name=" + "x" * 300, "name=xxx", "names have at most 200 bytes each"),
    (["runs_root='a\0b'"], r"runs_root=a\x00b: must be a text", NO_TEXT),
    ("runs_root=null", "runs_root=null: must be a text"),
    (
        ["runs_root='~nobody-of-this-name/x'"],
        "runs_root=~nobody-of-this-name/x: must be a folder of a user that exists",
    ),
    ("cache_root=[a]", "cache_root=[a]: must be a text, or null"),
    ("cache_root=" + "a/" * 1500, "cache_root=a/a/", "2000 together"),
    ("simulate.device=tpu", "simulate.device=tpu: must be one of cuda, cpu"),
    ("simulate.shards=0", "simulate.shards=0: " + COUNT),
    ("adapter.r=0", "adapter.r=0: " + COUNT),
    ("adapter.r=1e400", "adapter.r=inf: " + COUNT),
    ("adapter.alpha=0", "adapter.alpha=0: must be a number > 0"),
    ("adapter.alpha=1e400", "adapter.alpha=inf: must be a number > 0; infinity and NaN are none"),
    ("adapter.targets=[]", "adapter.targets=[]: must be all-linear, or a non-empty list, each entry a text"),
    ("adapter.targets=q_proj", "adapter.targets=q_proj: must be all-linear, or a non-empty list"),
    ("adapter.targets=[1]", "adapter.targets=[1]: must be all-linear, or a non-empty list"),
    ("model.name=7", "model.name=7: must be a text, or null"),
    ("model.path=null", "model.path=null: must be a text"),
    ("model.revision=12e4567", "model.revision=inf: must be a text, or null", "quotes inside quotes"),
    ("model.layers=0", "model.layers=0: must be a whole number >= 1, or null"),
    ("model.shape=[1]", "model.shape=[1]: must be a mapping, or null"),
    ("prune.name=random", "prune.name=random: must be one of none, magnitude, wanda, sparsegpt"),
    ("prune.samples=0", "prune.samples=0: " + COUNT),
    ("prune.samples=99999999999999999999", "prune.samples=99999999999999999999: " + COUNT, "too large"),
    ("prune.sequence_length=1", "prune.sequence_length=1: must be a whole number >= 2"),
    ("prune.seed=-1", "prune.seed=-1: must be a whole number >= 0"),
    ("prune.seed=5000000000", "prune.seed=5000000000: must be a whole number >= 0 and <= 4294967295"),
    ("prune.text=5", "prune.text=5: must be a text, or null"),
    ("prune=magnitude prune.group=block", "prune.group=block: must be one of layer, row"),
    ("prune=magnitude prune.samples=-1", "prune.samples=-1: must be a whole number >= 0"),
    ("prune=sparsegpt prune.damping=-0.1", "prune.damping=-0.1: must be a number >= 0"),
    ("prune=sparsegpt prune.damping=nan", "prune.damping=nan: must be a number >= 0; infinity and NaN are none"),
    ("prune=sparsegpt prune.block_size=0", "prune.block_size=0: " + COUNT),
    ("+method.keeps_zeros=maybe", "method.keeps_zeros=maybe: must be true or false, or null"),
    ("+method.trains=0", "method.trains=0: must be true or false"),
    ("+method.init_rows=0", "method.init_rows=0: must be a whole number >= 1, or null"),
    ("+method.max_grad_norm=-1", "method.max_grad_norm=-1: must be a number >= 0, or null"),
    ("+method.merges=dense", "method.merges=dense: must be a list, each entry a text, or null"),
    ("data.kind=images", "data.kind=images: must be one of microworld, instruction, text"),
    ("data.loss_on=question", "data.loss_on=question: must be one of all, answer"),
    ("data.template=vicuna", "data.template=vicuna: must be alpaca, or null"),
    ("data.limit=0", "data.limit=0: must be a whole number >= 1, or null"),
    ("data.limit=9223372036854775808", "data.limit=9223372036854775808: must be a whole number", "too large"),
    ("data.split=null", "data.split=null: must be a text"),
    ("train.steps=abc", "train.steps=abc: " + COUNT),
    ("train.steps=0", "train.steps=0: " + COUNT),
    ("train.steps=1.5", "train.steps=1.5: " + COUNT),
    ("train.steps_by_mode.run=0 train.steps=2", "train.steps_by_mode.run=0: " + COUNT),
    ("train.epochs=0", "train.epochs=0: must be a number > 0, or null"),
    ("train.epochs=1e400", "train.epochs=inf: must be a number > 0, or null; infinity and NaN are none"),
    ("train.batch_size=0", "train.batch_size=0: " + COUNT),
    ("train.batch_size=8.0", "train.batch_size=8.0: " + COUNT),
    ("train.gradient_accumulation=0", "train.gradient_accumulation=0: " + COUNT),
    ("train.sequence_length=1", "train.sequence_length=1: must be a whole number >= 2"),
    ("train.pad=left", "train.pad=left: must be one of longest, fixed"),
    ("train.learning_rate=fast", "train.learning_rate=fast: must be a number > 0"),
    ("train.learning_rate=0", "train.learning_rate=0: must be a number > 0"),
    ("train.learning_rate=-1e-3", "train.learning_rate=-0.001: must be a number > 0"),
    ("train.learning_rate=inf", "train.learning_rate=inf: must be a number > 0; infinity and NaN are none"),
    ("train.learning_rate=[1e-3]", "train.learning_rate=[0.001]: must be a number > 0"),
    ("train.minimum_learning_rate=-1", "train.minimum_learning_rate=-1: must be a number >= 0"),
    ("train.warmup_steps=-1", "train.warmup_steps=-1: must be a whole number >= 0"),
    ("train.weight_decay=1e400", "train.weight_decay=inf: must be a number >= 0; infinity and NaN are none"),
    ("train.weight_decay=-0.1", "train.weight_decay=-0.1: must be a number >= 0"),
    ("train.betas=[0.9]", "train.betas=[0.9]: must be a list of 2, each entry a number >= 0 and < 1"),
    ("train.betas=[0.9,1]", "train.betas=[0.9, 1]: must be a list of 2, each entry a number >= 0 and < 1"),
    ("train.betas=[0.9,0.99,0.999]", "train.betas=[0.9, 0.99, 0.999]: must be a list of 2"),
    ("train.max_grad_norm=0", "train.max_grad_norm=0: must be a number > 0, or null"),
    ("train.precision=fp8", "train.precision=fp8: must be one of float32, bf16_mixed, bf16"),
    ("train.activation_checkpointing=yes", "train.activation_checkpointing=yes: must be true or false"),
    ("train.init_rows=0", "train.init_rows=0: " + COUNT),
    ("train.timing_warmup=-1", "train.timing_warmup=-1: must be a whole number >= 0"),
    ("train.checkpoint_every=0", "train.checkpoint_every=0: must be a whole number >= 1, or null"),
    ("eval.tasks=rte", "eval.tasks=rte: must be a list, each entry a text"),
    ("eval.tasks=[rte,null]", "eval.tasks=[rte, null]: must be a list, each entry a text"),
    ("eval.data_root=true", "eval.data_root=true: must be a text, or null"),
    ("eval.limit=0", "eval.limit=0: must be a whole number >= 1, or null"),
    ("eval.batch_size=auto", "eval.batch_size=auto: " + COUNT),
    ("eval.add_bos_token=null", "eval.add_bos_token=null: must be true or false"),
    ("eval.perplexity.window=1", "eval.perplexity.window=1: must be a whole number >= 2"),
    ("eval.perplexity.text=null", "eval.perplexity.text=null: must be a text"),
    ("eval.baselines=3", "eval.baselines=3: must be true or false"),
    ("launch.arguments=3", "launch.arguments=3: must be a list, each entry a text"),
)

# A section in the place of a value, a value in that of a section, a reference to nothing.
NESTING = entries(
    "nesting",
    ("adapter=null", "adapter=null: must be a mapping"),
    ("adapter=abc", "adapter=abc: must be a mapping"),
    ("simulate=3", "simulate=3: must be a mapping"),
    ("train.steps_by_mode=null train.steps=2", "train.steps_by_mode=null: must be a mapping"),
    ("eval.perplexity=wikitext", "eval.perplexity=wikitext: must be a mapping, or null"),
    ("seed={a:1}", "seed={a: 1}: must be a whole number >= 0"),
    ("train.steps=[1,2]", "train.steps=[1, 2]: " + COUNT),
    ("method.peft=abc", "method.peft=abc: must be a mapping, or null"),
    ("method=flat_lora method.callbacks=[3]", "method.callbacks=[3]: must be a list, each entry a mapping"),
    ("~train.batch_size", "train.batch_size: must be given; it is missing in the config"),
    ("~seed", "seed: must be given; it is missing in the config"),
    ("~eval", "eval: must be given; it is missing in the config"),
    ("model.path=???", "model.path: must be given, as in model.path=VALUE"),
    ("data=text data.path=???", "data.path: must be given, as in data.path=VALUE"),
    ("train.steps=${nowhere}", "train.steps=${nowhere}: must refer to something that exists", "'nowhere' not found"),
    ("name=${name}", "name=${name}: must refer to something that exists (Recursive interpolation detected)"),
    ("seed=${oc.env:NO_SUCH_VARIABLE}", "seed=${oc.env:NO_SUCH_VARIABLE}: must refer to something", "not found"),
    ("name=${seed}", "name=0: must be a text"),
)

# Keys that no run has, which Hydra adds behind + and ++.
UNKNOWN = entries(
    "unknown key",
    ("+train.lr=0.1", "train.lr: no such key; did you mean train.learning_rate?"),
    ("++train.learning_rat=0.1", "train.learning_rat: no such key; did you mean train.learning_rate?"),
    ("+learning_rate=0.1", "learning_rate: no such key; did you mean train.learning_rate?"),
    ("+sede=1", "sede: no such key; did you mean seed?"),
    ("+x=1", "x: no such key; the config has sparsity, pattern, seed"),
    ("+simulate.x=1", "simulate.x: no such key; simulate has device, shards"),
    ("++adapter.rank=3", "adapter.rank: no such key; adapter has r, alpha, targets"),
    ("+model.size=3", "model.size: no such key; model has name, path, revision, layers, shape"),
    ("+prune.sample=3", "prune.sample: no such key; did you mean prune.samples?"),
    ("+prune.damping=0.1", "prune.damping: no such key; prune has name, samples, sequence_length, seed, text"),
    ("+data.shuffle=true", "data.shuffle: no such key; data has name, kind, path"),
    ("+train.steps_by_mode.runs=4", "train.steps_by_mode.runs: no such key; did you mean train.steps_by_mode.run?"),
    ("+eval.task=[rte]", "eval.task: no such key; did you mean eval.tasks?"),
    ("+eval.perplexity.windows=8", "eval.perplexity.windows: no such key; did you mean eval.perplexity.window?"),
    ("+launch.nodes=2", "launch.nodes: no such key; launch has name, arguments"),
    ("+method.keep_zeros=true", "method.keep_zeros: no such key; did you mean method.keeps_zeros?"),
    ("++method.peft.scalin=x", "method.peft.scalin: no such key; did you mean method.peft.scaling?"),
    ("++method.prepare.samples=3", "method.prepare.samples: no such key"),
    ("method=gelora +method.prepare.positions=mean", "method.prepare.positions: no such key; did you mean"),
    ("method=sora +method.optimizer.shrinkag=1", "method.optimizer.shrinkag: no such key; did you mean"),
    ("method=lora_rite +method.optimizer.clp=1", "method.optimizer.clp: no such key; did you mean"),
    ("method=sora +method.penalty.wight=1", "method.penalty.wight: no such key; did you mean method.penalty.weight?"),
    ("method=sora ++method.callbacks.0.every=1", "method.callbacks[0].every: no such key"),
    ("++method.optimizer.lr=1", "method.optimizer={lr: 1}: must be a mapping with a _target_"),
)

# Each value is allowed, together they are not.
CONTRADICTIONS = [
    *entries(
        "contradiction",
        ("sparsity=0.7 pattern=2:4", "sparsity=0.7 contradicts pattern='2:4'", "leave sparsity out"),
        ("method.peft.storage=n:m", "method.peft.storage=n:m: must be dense, bitmap or auto with pattern=unstructured"),
        ("method.peft.forward_product=2:4", "method.peft.forward_product=2:4: must be dense or auto"),
        ("method.peft.forward_product=2:4 pattern=1:4", "method.peft.forward_product=2:4: must be dense or auto"),
        ("train.minimum_learning_rate=1", "train.minimum_learning_rate=1: must be at most train.learning_rate=0.003"),
        ("train.steps=null", "train.steps=null: must be a whole number >= 1 where train.epochs is null"),
        ("train.steps=4 train.warmup_steps=4", "train.warmup_steps=4: must be below train.steps=4"),
        ("mode=profile train.epochs=1", "train.epochs=1: must be null in mode=profile"),
        ("model.layers=1", "model.layers=1: must be null in mode=run"),
        ("model=microworld model.path={model}", "model.path={model}: must be microworld here; model=hf takes"),
        ("model.revision=main", "model.revision=main: must be null for a folder"),
        ("data.path=null", "data.path=null: must be a file or a name on the Hub for data.kind=instruction"),
        ("data=microworld data.path={sources}/text.jsonl", "data.path={sources}/text.jsonl: must be null", "data=text"),
        ("data=microworld data.split=test", "data.split=test: must be train for data.kind=microworld"),
        ("data.split=test", "data.split=test: must be train for data.path={sources}/instructions.jsonl"),
        ("data=text data.split=test data.path=c4", "data.split=test: must be train for data.path=c4"),
        ("data=text data.path={sources}/text.jsonl data.loss_on=answer", "data.loss_on=answer: must be all for"),
        ("data.template=null", "data.template=", "must be alpaca for data.kind=instruction"),
        ("eval.tasks=[rte,rte]", "eval.tasks=[rte, rte]: must have each task once; rte is there twice"),
        ("+eval.split=validation", "eval.split=validation: must be test for rte"),
        ("mode=simulate method=none", "method=none: must be one that trains in mode=simulate"),
        ("mode=simulate method=shira", "method=shira: must be one whose step needs no values"),
        ("mode=profile model.layers=3", "model.layers=3: must be at most 2, the layers of the model"),
        ("train.sequence_length=129", "train.sequence_length=129: must be at most 128, the positions of model="),
        ("prune.sequence_length=129", "prune.sequence_length=129: must be at most 128, the positions of model="),
        ("eval.perplexity.window=129", "eval.perplexity.window=129: must be at most 128, the positions of model="),
        ("pattern=3:5", "pattern='3:5': groups of 5 do not divide the input width 32 of model.layers.0"),
        ("pattern=8:32", "pattern='8:32': groups of 32 do not divide the input width 48", "down_proj"),
        ("adapter.r=17", "adapter.r=17: must be at most 16; model.layers.0.self_attn.k_proj is 16 x 32"),
        ("adapter.targets=[query]", "method=lors: target_modules: 'query' matches no module", "q_proj"),
        ("adapter.targets=[q_proj,lm_hed]", "method=lors: target_modules: 'lm_hed'", "did you mean lm_head"),
    ),
    *entries(
        "contradiction",
        ("launch=torchrun", "launch.arguments=[-m, torch", "must start one process, not WORLD_SIZE=2"),
        environment={"WORLD_SIZE": "2"},
    ),
    *entries(
        "contradiction",
        ("seed=0", "launch.arguments=[]: must start one process, not WORLD_SIZE=two"),
        environment={"WORLD_SIZE": "two"},
    ),
]

# What only the class of the method knows, two of each method that has options.
METHODS = entries(
    "method",
    ("method.peft.scaling=loud", "method.peft.scaling='loud': must be one of rank_stabilized, alpha_over_r"),
    ("method.peft.init=svd", "method.peft.init='svd': must be one of gradient, kaiming"),
    ("method.peft.storage=sparse", "method.peft.storage='sparse': must be one of"),
    ("method.peft.exact_gradient=1", "method.peft.exact_gradient=1: must be true or false"),
    ("+method.prepare.oversampling=0", "method.prepare.oversampling=0", "at least 1"),
    ("+method.prepare.seed=1", "method=lors: ", "multiple values for", "'seed'"),
    (
        "+method.merges=[merged,folded]",
        "method.merges=folded: must be one or more of merged, adapter, remasked, dense",
    ),
    ("method.peft._target_=nowhere.Config", "method.peft._target_=nowhere.Config: must be the name of a class"),
    ("method.peft._target_=null", "method.peft._target_=null: must be the name of a class"),
    ("method._target_=collections.OrderedDict", "method._target_=collections.OrderedDict: must be harness.method"),
    ("method.prepare._partial_=3", "method.prepare._partial_=3: must be true or false"),
    ("method=flat_lora method.peft.sigma=-1", "method.peft.sigma=-1: must be a number >= 0"),
    ("method=flat_lora method.peft.interval=0", "method.peft.interval=0: must be a positive number of steps"),
    ("method=flat_lora method.peft.divisor=height", "method.peft.divisor='height': must be one of width, kept"),
    ("method=gelora method.peft.scaling=none", "method.peft.scaling='none': must be one of constant, alpha_over_r"),
    ("method=gelora method.prepare.position=end", "method.prepare.position='end': must be one of prompt_end, random"),
    ("method=gelora method.prepare.estimator=mean", "method.prepare.estimator='mean': must be one of fit, likelihood"),
    ("method=gelora method.prepare.cap=many", "method.prepare.cap=many: must be a whole number"),
    ("method=geolora method.peft.tolerance=1", "method.peft.tolerance=1: must be a number with 0 <= tolerance < 1"),
    ("method=geolora method.peft.truncation=middle", "method.peft.truncation='middle': must be one of end, three_quar"),
    ("method=geolora method.peft.largest_rank=2", "method.peft.largest_rank=2: must be a whole number >= 4"),
    ("method=hira method.peft.hira_dropout=2", "method=hira: ", "dropout probability", "2"),
    ("method=hira method.peft.hira_dropout=often", "method.peft.hira_dropout=often: must be a number"),
    ("method=ia3 method.peft.feedforward_modules=3", "method.peft.feedforward_modules=3: must be"),
    ("method=ia3 method.peft.target_modules=[qproj]", "method=ia3: ", "'qproj'"),
    ("method=lora method.peft.lora_dropout=1.5", "method=lora: ", "dropout probability", "1.5"),
    ("method=lora method.peft.use_rslora=yes", "method.peft.use_rslora=yes: must be true or false"),
    ("method=lora_mini method.peft.a=0", "method.peft.a=0: must be a positive integer or null"),
    ("method=lora_mini method.peft.outer=random", "method.peft.outer='random': must be one of"),
    (
        "method=lora_mini method.peft.outer=svd method.peft.share_outer=true",
        "method.peft.share_outer=True: must be false",
    ),
    ("method=lora_rite method.optimizer.eps=-1", "method.optimizer.eps=-1: must be a positive number"),
    ("method=lora_rite method.optimizer.clip=abc", "method.optimizer.clip=abc: must be a number, or null"),
    ("method=lora_rite method.optimizer.escaped_mass=all", "method.optimizer.escaped_mass='all': must be one of none"),
    ("method=mora method.peft.mora_type=3", "method.peft.mora_type=3: must be 1 (sharing) or 6 (rotation)"),
    ("method=mora method.peft.wide_mode=wrap", "method.peft.wide_mode='wrap': must be one of"),
    ("method=rm_lora method.peft.keep_rate=0", "method.peft.keep_rate=0: must be a number with 0 < keep_rate <= 1"),
    ("method=rm_lora method.peft.penalty=l2", "method.peft.penalty='l2': must be one of"),
    ("method=rm_lora method.peft.init_std=-1", "method.peft.init_std=-1: must be a number >= 0"),
    ("method=sherl method.peft.late_layers=2", "method.peft.late_layers=2: must be below the 2 blocks"),
    ("method=sherl method.peft.reduction=64", "method.peft.reduction=64: must be at most 32"),
    ("method=sherl method.merges=null", "method.merges=[merged]: must be [adapter]"),
    ("method=shira adapter.r=3.5", "adapter.r=3.5: " + COUNT),
    ("method=shira method.peft.r=0", "method=shira: ", "0"),
    ("method=sora method.optimizer.shrinkage=-1", "method.optimizer.shrinkage=-1: must be one number >= 0"),
    ("method=sora method.optimizer.scale=step", "method.optimizer.scale='step': must be one of rate, per_step"),
    ("method=sora method.optimizer.stage_steps=3", "method.optimizer.stage_steps=3: must be a positive number"),
    ("method=spp adapter.r=5", "adapter.r=5: ", "must divide the output width"),
    ("method=spp method.peft.organisation=flat", "method.peft.organisation='flat': must be one of plain"),
    ("method=spp_gc method.peft.dropout=1", "method.peft.dropout=1: must be a probability"),
    ("method=sqft method.peft.form=one", "method.peft.form='one': must be one of two_products, fused"),
    ("method=sqft_fused method.peft.dropout=0.1", "method.peft.dropout=0.1: must be 0"),
    ("method=sqft_gc method.peft.checkpoint=1", "method.peft.checkpoint=1: must be true or false"),
    ("method=xgblora method.peft.boosters=0", "method.peft.boosters=0: must be a whole number >= 1"),
    ("method=xgblora method.peft.unit=row", "method.peft.unit='row': must be one of block, matrix"),
    ("method=xgblora method.peft.drawn=1000", "method.peft.drawn=1000: the model has 2 units"),
    ("method=full +method.prepare.lr=1", "method.prepare.lr: no such key"),
    ("method=none method.trains=true", "method=none: ", "needs method.peft, method.prepare, or trains: false"),
)


def config(**changes: object) -> Change:
    """Other entries of ``config.json``."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    change.__name__ = " ".join(f"{name}={value}" for name, value in changes.items())
    return change


def holds(name: str, content: str | bytes) -> Change:
    """Another content of a file."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    change.__name__ = f"{name} {content[:20]!r}"
    return change


def without(*names: str) -> Change:
    """Files that are not there."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    change.__name__ = f"without {' '.join(names)}"
    return change


def weights(what: str, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    """Other weights."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(edit(load_file(file)), file, {"format": "pt"})

    change.__name__ = what
    return change


def cut(folder: Path) -> None:
    """Half of the weights' file."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class _Code:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def broken(*changes: Change, says: tuple[str, ...], slow: bool = False) -> Bad:
    """A model folder that is not as it should be."""
    return Bad("model", ("model.path={here}/model",), ("model.path={here}/model: ", *says), model=changes, slow=slow)


Q = "model.layers.0.self_attn.q_proj"
INDEX = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../weights.safetensors"}})
MISSING_SHARD = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}})
CODE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
NO_CONFIG, NO_TOKENIZER = "no usable config.json", "no usable tokenizer"
APART, UNREADABLE, NO_MODEL = "do not belong together", "its weights cannot be read", "makes no model that can be used"
MODELS = [
    *entries(
        "model",
        ("model.path=./nowhere", "model.path=./nowhere: no such folder; must be a model folder or a name on the Hub"),
        ("model.path=/no/such/model", "model.path=/no/such/model: no such folder; must be a model folder"),
        ("model.path=nobody/nothing", "model.path=nobody/nothing: no such folder, and the Hub gave " + NO_CONFIG),
        ("model.path=a/b/c", "model.path=a/b/c: no such folder, and the Hub gave " + NO_CONFIG),
        ("model.path={model}/config.json", "model.path={model}/config.json: is a file; must be a model folder"),
        ("model.path={sources}", "model.path={sources}: the folder has " + NO_CONFIG),
        ("model.path=" + "x" * 300, "model.path=xxx", "no such folder"),
    ),
    broken(without("config.json"), says=(NO_CONFIG,)),
    broken(holds("config.json", '{"model_type": "lla'), says=(NO_CONFIG, "not a valid JSON file")),
    broken(holds("config.json", ""), says=(NO_CONFIG,)),
    broken(holds("config.json", "3"), says=(NO_CONFIG,)),
    broken(config(model_type="fancy"), says=(NO_CONFIG, "fancy")),
    broken(config(model_type="t5"), says=(NO_MODEL, "T5Config"), slow=True),
    broken(config(model_type="gpt2"), says=(NO_MODEL, "Conv1D")),
    broken(config(model_type="bert"), says=(APART, "44 missing from the files", "21 that the model does not have")),
    broken(config(model_type="custom", auto_map=CODE), says=(NO_CONFIG, "custom code")),
    broken(config(hidden_size="32"), says=(NO_CONFIG, "hidden_size")),
    broken(config(vocab_size=-5), says=(NO_MODEL, "-5")),
    broken(config(hidden_act="nonsense"), says=(NO_MODEL, "nonsense")),
    broken(config(pad_token_id=99999), says=(NO_MODEL, "Padding_idx")),
    broken(config(num_hidden_layers=0), says=("without linear layers in decoder blocks",)),
    broken(
        config(num_hidden_layers=3), says=(APART, "9 missing from the files (model.layers.2.input_layernorm.weight")
    ),
    broken(config(num_hidden_layers=1), says=(APART, "9 that the model does not have (model.layers.1")),
    broken(config(intermediate_size=64), says=(APART, "6 of another shape than config.json says")),
    broken(config(vocab_size=100), says=(APART, "2 of another shape than config.json says (lm_head.weight")),
    broken(config(quantization_config={"quant_method": "gptq", "bits": 4}), says=("must not be quantized",)),
    broken(config(dtype="float99"), says=(NO_CONFIG, "float99")),
    broken(without("model.safetensors"), says=("the folder has no weights (*.safetensors, *.bin)",)),
    broken(cut, says=(UNREADABLE, "incomplete metadata")),
    broken(holds("model.safetensors", b""), says=(UNREADABLE, "header too small")),
    broken(holds("model.safetensors", "<html>not found</html>"), says=(UNREADABLE, "header too large")),
    broken(
        weights("no q_proj", lambda W: {k: w for k, w in W.items() if Q not in k}),
        says=(APART, f"1 missing from the files ({Q}.weight)"),
    ),
    broken(
        weights("no head", lambda W: {k: w for k, w in W.items() if k != "lm_head.weight"}),
        says=(APART, "1 missing from the files (lm_head.weight)"),
    ),
    broken(
        weights("renamed", lambda W: {f"base_model.model.{k}": w for k, w in W.items()}),
        says=(APART, "21 missing", "21 that"),
    ),
    broken(
        weights("an adapter too", lambda W: W | {f"{Q}.lora_A.weight": torch.ones(4, 32)}),
        says=(APART, f"1 that the model does not have ({Q}.lora_A.weight)"),
    ),
    broken(
        weights("transposed", lambda W: W | {k: w.t().contiguous() for k, w in W.items() if "layers.0.mlp.up" in k}),
        says=(APART, "1 of another shape"),
    ),
    broken(
        weights("int8", lambda W: {k: (100 * w).to(torch.int8) for k, w in W.items()}),
        says=("is stored as I8; must be F64, F32, F16, BF16",),
    ),
    broken(
        weights("float8", lambda W: {k: w.to(torch.float8_e4m3fn) for k, w in W.items()}),
        says=("is stored as F8_E4M3",),
    ),
    broken(
        holds("model.safetensors.index.json", INDEX),
        says=("model.safetensors.index.json must name files beside it", "../weights"),
    ),
    broken(
        without("model.safetensors"),
        holds("model.safetensors.index.json", MISSING_SHARD),
        holds("other.safetensors", b""),
        says=(UNREADABLE, "model-00001-of-00001.safetensors"),
    ),
    broken(
        without("model.safetensors"),
        holds("model.safetensors.index.json", "{"),
        holds("other.safetensors", b""),
        says=(UNREADABLE,),
    ),
    broken(without("model.safetensors"), holds("pytorch_model.bin", b"garbage"), says=(UNREADABLE,)),
    broken(without("model.safetensors"), holds("pytorch_model.bin", pickle.dumps(_Code())), says=(UNREADABLE,)),
    broken(
        holds("adapter_config.json", "{}"), says=("must be a whole model; adapter_config.json says it is an adapter",)
    ),
    broken(
        without("config.json", "model.safetensors"),
        holds("adapter_config.json", '{"peft_type": "LORA"}'),
        holds("adapter_model.safetensors", b""),
        says=(NO_CONFIG,),
    ),
    broken(
        without("tokenizer.json"), says=("the folder has no tokenizer (tokenizer.json, tokenizer.model, vocab.json)",)
    ),
    broken(holds("tokenizer.json", "{}"), says=(NO_TOKENIZER,)),
    broken(holds("tokenizer.json", '{"model": '), says=(NO_TOKENIZER,)),
    broken(holds("tokenizer_config.json", "[]"), says=(NO_TOKENIZER,)),
    broken(
        holds(
            "tokenizer_config.json",
            '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}',
        ),
        says=(NO_TOKENIZER, "custom code"),
    ),
    broken(
        holds("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}'),
        says=("its tokenizer cannot encode a text",),
    ),
]

ROW = '{"instruction": "a", "output": "b"}\n'


def file(key: str, name: str, content: str | bytes | None, *says: str, given: str = "") -> Bad:
    """A file of training rows or text that is not as it should be; ``key`` is the key that names it."""
    words = (f"{key}={{here}}/{name}", *given.split())
    return Bad("file", words, (f"{key}", f"{{here}}/{name}", *says), files={name: content})


DATA = [
    *entries(
        "file",
        ("data.path=/no/such.jsonl", "data.path=/no/such.jsonl: no such file"),
        ("data.path=nobody/nothing", "data.path=nobody/nothing: no such file, and split 'train' of the data set"),
        ("data.path=/dev/zero", "data.path=/dev/zero: is no regular file"),
        ("data=text data.path=/no/such.txt", "data.path=/no/such.txt: no such file"),
        ("prune.text=/no/such.jsonl", "prune.text=/no/such.jsonl: no such file"),
        ("prune.text=null", "prune.text=c4: no such file", "could not be read from the Hub"),
        ("eval.perplexity.text=/no/such.txt", "eval.perplexity.text=/no/such.txt: no such file"),
        ("eval.perplexity.text=wikitext", "eval.perplexity.text={sources}/wikitext/test.jsonl: no such file"),
        ("eval.data_root=/no/such", "eval.data_root=/no/such: no such folder"),
        ("eval.data_root={sources}/text.jsonl", "eval.data_root={sources}/text.jsonl: no such folder"),
        ("train.sequence_length=8 data.loss_on=answer", "train.sequence_length=8: shorter than every prompt"),
    ),
    file("data.path", "folder.jsonl", None, "is a folder; must be a file"),
    file("data.path", "empty.jsonl", "", "no row to train on; the data set is empty"),
    file("data.path", "blank.jsonl", "\n \n", "no row to train on; the data set is empty"),
    file("data.path", "latin.jsonl", '{"instruction": "caf\xe9"}'.encode("latin-1"), "not UTF-8 text"),
    file("data.path", "binary.jsonl", b"\x00\x01", ":1: not valid JSON"),
    file("data.path", "cut.jsonl", ROW + '{"instruction": ', ":2: not valid JSON"),
    file("data.path", "quotes.jsonl", "{'instruction': 'a', 'output': 'b'}\n", ":1: not valid JSON", "double quotes"),
    file("data.path", "table.csv", "instruction,output\na,b\n", ":1: not valid JSON"),
    file(
        "data.path", "nan.jsonl", '{"instruction": NaN, "output": "b"}\n', ":1: not valid JSON (NaN is no JSON number)"
    ),
    file(
        "data.path", "twice.jsonl", '{"instruction": "a", "instruction": "b"}\n', ":1: not valid JSON", "a name twice"
    ),
    file(
        "data.path", "half.jsonl", '{"instruction": "\\ud800", "output": "b"}\n', ":1: not valid JSON (half of a surrog"
    ),
    file("data.path", "deep.jsonl", ROW + '{"n": ' + "[" * 100_000, ":2: not valid JSON (nested too deeply)"),
    file("data.path", "digits.jsonl", '{"n": ' + "9" * 5000 + "}\n", ":1: not valid JSON"),
    file("data.path", "number.jsonl", ROW + "3\n", ":2: must be a JSON object, not int"),
    file("data.path", "list.json", f"[{ROW}, 3]", "entry 2 must be a JSON object, not int"),
    file("data.path", "column.jsonl", '{"instruct": "a"}\n', "row 1 has no column 'instruction'", "'instruct'"),
    file("data.path", "answer.jsonl", '{"instruction": "a"}\n', "row 1 has no column 'output'"),
    file(
        "data.path", "null.jsonl", '{"instruction": "a", "output": null}\n', "'output' of row 1 must be text, not None"
    ),
    file(
        "data.path", "input.jsonl", '{"instruction": "a", "output": "b", "input": 3}\n', "'input' of row 1 must be text"
    ),
    file(
        "data.path", "short.txt", "the cat", "less text than one block of train.sequence_length=128", given="data=text"
    ),
    file("data.path", "none.txt", "", "less text than one block of train.sequence_length=128", given="data=text"),
    file("data.path", "zero.txt", b"a\x00b", "not text (it holds a null character)", given="data=text"),
    file("data.path", "body.jsonl", '{"body": "a"}\n', "row 1 has no column 'text'", given="data=text"),
    file(
        "prune.text", "short.jsonl", '{"text": "the cat"}\n', "holds 3 tokens; one sample of prune.sequence_length=32"
    ),
    file("prune.text", "blank.txt", " \n\n ", "holds 0 tokens; one sample of prune.sequence_length=32 needs 31"),
    file("prune.text", "packed.jsonl.gz", b"\x1f\x8b\x08\x00", "not UTF-8 text"),
    file("prune.text", "null.jsonl", '{"text": null}\n', "column 'text' of row 1 must be text, not None"),
    file("prune.text", "half.jsonl", '{"text": "\\udfff"}\n', ":1: not valid JSON (half of a surrogate pair)"),
    file("eval.perplexity.text", "number.jsonl", '{"text": 3}\n', "column 'text' of row 1 must be text, not 3"),
    file("eval.perplexity.text", "cut.jsonl", '{"te', ":1: not valid JSON"),
    file("eval.perplexity.text", "page.pdf", b"%PDF-1.4\x00\xff", "not UTF-8 text"),
    Bad(
        "file",
        ("eval.perplexity.text={here}/few.txt",),
        ("eval.perplexity.window=16: must be at most 3",),
        files={"few.txt": "the cat"},
    ),
]

BOOLQ = {"question": "a", "passage": "b", "label": 1}
HELLASWAG = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"}
WINOGRANDE = {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"}
ARC = {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "A"}
BOOK = {"question_stem": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "A"}
RTE = {"sentence1": "a", "sentence2": "b", "label": 0}


def task(
    name: str, row: Mapping[str, object] | str, *says: str, split: str = "validation", first: object = None
) -> Bad:
    """A file of a task with a bad row, behind a good one if there is a ``first``."""
    path = f"{name}/{split}.jsonl"
    rows = [json.dumps(first)] if first else []
    content = "\n".join([*rows, row if isinstance(row, str) else json.dumps(row)])
    words = ("eval.data_root={here}", f"eval.tasks=[{name}]")
    return Bad("task", words, ("eval.data_root", f"{{here}}/{path}", *says), files={path: content})


TASKS = [
    *entries(
        "task",
        ("eval.tasks=[boolq]", "eval.data_root={sources}/boolq/validation.jsonl: no such file"),
        ("eval.data_root=null", "eval.tasks=rte: cannot be loaded", "eval.data_root=FOLDER"),
    ),
    # All tasks of lm-eval are looked through.
    *entries(
        "task",
        ("eval.tasks=[rte,rtee]", "eval.tasks: unknown task 'rtee'; must be a task of lm-eval, or one of microworld_"),
        ("eval.tasks=[microworld_riddles]", "eval.tasks: unknown task 'microworld_riddles'"),
        ("eval.tasks=[lambada_openai]", "eval.tasks=lambada_openai: cannot be loaded", "the cache of datasets"),
        ("eval.tasks=[humaneval]", "eval.tasks=humaneval: ", "code"),
        slow=True,
    ),
    task("boolq", "", "is empty"),
    task("boolq", '{"question": ', ":1: not valid JSON"),
    task("boolq", "[1]", "entry 1 must be a JSON object"),
    task("boolq", {"question": "a", "passage": "b"}, "row 1", "has no column 'label'"),
    task("boolq", BOOLQ | {"passage": None}, "'passage' of row 2", "must be text, not None", first=BOOLQ),
    task("boolq", BOOLQ | {"label": 2}, "'label' of row 1", "must be 0 or 1, not 2"),
    task("boolq", BOOLQ | {"label": True}, "'label' of row 1", "must be 0 or 1, not True"),
    task("rte", RTE | {"label": -1}, "'label' of row 1", "must be 0 or 1, not -1"),
    task(
        "rte", '{"sentence1": "\\ud800", "sentence2": "b", "label": 0}', ":1: not valid JSON (half of a surrogate pair)"
    ),
    task("hellaswag", HELLASWAG | {"label": "2"}, "'label' of row 1", "must be the number of an ending"),
    task("hellaswag", HELLASWAG | {"label": ""}, "'label' of row 1", "must be the number of an ending"),
    task("hellaswag", HELLASWAG | {"endings": ["d"]}, "'endings' of row 1", "must be two or more texts"),
    task("hellaswag", HELLASWAG | {"label": 1}, "'label' of row 2", "of the same type in all rows", first=HELLASWAG),
    task("winogrande", WINOGRANDE | {"sentence": "a b"}, "'sentence' of row 1", "must be text with a _ for the answer"),
    task("winogrande", WINOGRANDE | {"answer": "3"}, "'answer' of row 1", 'must be "1" or "2", not \'3\''),
    task("winogrande", WINOGRANDE | {"option1": " "}, "'option1' of row 1", "must be text that is not blank"),
    task("arc_easy", ARC | {"answerKey": "E"}, "'answerKey' of row 1", "must be one of choices.label", split="test"),
    task(
        "arc_easy",
        ARC | {"choices": ["b", "c"]},
        "'choices' of row 1",
        "must be a mapping of text and label",
        split="test",
    ),
    task(
        "arc_easy",
        ARC | {"choices": {"text": ["b", "c"], "label": ["A", "A"]}},
        "'choices' of row 1",
        "all labels different",
        split="test",
    ),
    task("openbookqa", BOOK | {"answerKey": "C"}, "'answerKey' of row 1", "must be one of choices.label", split="test"),
]

# Folders that cannot be used.
FOLDERS = [
    Bad("folder", ("runs_root={here}/file",), ("runs_root: cannot write to {here}/file/default/",), files={"file": ""}),
    Bad("folder", ("runs_root={here}/file/below",), ("runs_root: cannot write to ",), files={"file": ""}),
    Bad(
        "folder",
        ("runs_root={here}/runs", "name=mine"),
        ("runs_root: cannot write to {here}/runs/mine/",),
        files={"runs/mine": ""},
    ),
    *entries("folder", ("runs_root=/proc/nowhere", "runs_root: cannot write to /proc/nowhere")),
    Bad("folder", ("cache_root={here}/file",), ("cache_root: cannot write to {here}/file",), files={"file": ""}),
    Bad(
        "folder",
        ("cache_root={here}/file/below",),
        ("cache_root: cannot write to {here}/file/below",),
        files={"file": ""},
    ),
    *entries("folder", ("cache_root=/proc/nowhere", "cache_root: cannot write to /proc/nowhere")),
    *(
        Bad(
            "folder",
            ("cache_root={here}",),
            (f"cache_root: {{here}}/{name} must be a folder; it is a file",),
            files={name: ""},
        )
        for name in ("tokens", "pruned", "scores", "devices")
    ),
]

# More than the memory holds.
MEMORY = [
    *entries(
        "memory",
        ("train.batch_size=100000", "train.batch_size=100000: must be smaller; a step of 24 x 128 tokens would need"),
        free=5_000_000,
    ),
    *entries(
        "memory",
        ("prune.samples=100000", "prune.samples=100000: must be smaller; what they are at one layer would need", "GiB"),
        free=5_000_000,
    ),
    *entries(
        "memory",
        (
            "mode=profile train.batch_size=1000000000",
            "train.batch_size=1000000000: must be smaller; the rows of a step",
        ),
        ("mode=profile train.steps=1000000000", "train.steps=1000000000: must be smaller; the rows of all steps would"),
    ),
    *entries(
        "memory",
        (
            "mode=profile train.batch_size=100000 train.steps=1",
            "train.batch_size=100000: must be smaller; a step of 100000 x 128",
        ),
        free=2**30,
        slow=True,
    ),
]

IN_PROCESS = [*VALUES, *NESTING, *UNKNOWN, *CONTRADICTIONS, *METHODS, *MODELS, *DATA, *TASKS, *FOLDERS, *MEMORY]


# Arguments of run.py. Those that Hydra has to compose first take a quarter of a second each.
NAMES = "must be name=value, and the name one of those in `python run.py --help`"
QUOTES = "must be name=value, with quotes around special characters"
FILE = "must stay as its file says; another method is another file in conf/method"
ARGUMENTS = entries(
    "command line",
    ("--steps=3", "--steps=3: no such flag; a value is set as name=value, without dashes"),
    ("--sparsity 0.5", "--sparsity: no such flag; a value is set as name=value"),
    ("-x", "-x: no such flag"),
    ("method=lors -ms seed=1", "-ms: no such flag"),
    ("--config-dir", "--config-dir : must be followed by a value"),
    ("--cfg jobs", "--cfg jobs: must be followed by job, hydra, all"),
    ("--version=3", "--version=3: must be --version without a value"),
    ("sparsity", "sparsity: " + QUOTES),
    ("train.steps:3", "train.steps:3: " + QUOTES),
    ("train.steps==3", "train.steps==3: " + QUOTES),
    ("train.steps=[1", "train.steps=[1: " + QUOTES),
    ("data.path='a", "data.path='a: " + QUOTES),
    ("data.path=a=b", "data.path=a=b: " + QUOTES),
    ("train.betas=(0.9,0.99)", "train.betas=(0.9,0.99): " + QUOTES),
    ("cache_root=~nobody", "cache_root=~nobody: " + QUOTES),
    ("seed=" + "9" * 5000, "seed=999", "..."),
    ([""], "'': " + QUOTES),
    (["seed =1"], "seed =1: " + QUOTES),
    (["name=a\nb"], "name=a b: " + QUOTES),
    (["data.path=\udcff"], r"data.path=\udcff: " + QUOTES),
    ("=3", "=3: " + NAMES),
    ("method@x=lors", "method@x=lors: " + NAMES),
    ("+model@other=hf", "+model@other=hf: " + NAMES),
    ("seed=0,1", "seed=0,1: must be one value without -m; a list of values has brackets, [a,b]"),
    ("method=lors,lora", "method=lors,lora: must be one value without -m"),
    ("eval.tasks=boolq,rte", "eval.tasks=boolq,rte: must be one value without -m; a list of values has brackets"),
    ("seed=range(0,3)", "seed=range(0,3): must be one value without -m"),
    ("method=lors method=lora", "method=lora: must be there once; method is set twice"),
    ("-m seed=0,1 seed=2", "seed=2: must be there once; seed is set twice"),
    ("-m experiment=smoke,rank_sweep", "experiment=smoke,rank_sweep: must be one; every preset is a sweep of its own"),
    ("+method=lora", "+method=lora: must be method=lora; every group has an option already"),
    ("~train.steps", "~train.steps: must stay; a run needs every key"),
    ("~method", "~method: must stay; a run needs every key"),
    ("method.peft=null", "method.peft=null: " + FILE),
    ("method.prepare=null", "method.prepare=null: " + FILE),
    ("method.name=lora", "method.name=lora: " + FILE),
    ("method.peft._target_=peft.LoraConfig", "method.peft._target_=peft.LoraConfig: " + FILE),
    ("method={peft:{_target_:peft.LoraConfig}}", "method={peft:{_target_:peft.LoraConfig}}: " + FILE),
    ("+method.penalty={_target_:a.b}", "+method.penalty={_target_:a.b}: " + FILE),
)
COMPOSED = [
    *entries(
        "command line",
        ("method=lrs", "method=lrs: must be one of flat_lora, full, ", "xgblora"),
        ("-m method=lors,lrs", "method=lrs: must be one of flat_lora, full, "),
        ("trian.steps=3", "trian.steps=3: no such key; did you mean train.steps?"),
        ("method.peft.rank=3", "method.peft.rank=3: no such key; did you mean method.peft.r?"),
        ("adapter={r:3,x:4}", "adapter.x: no such key; did you mean adapter.r?"),
        ("eval=none eval.perplexity.text=a", "eval.perplexity.text=a: no such key here; eval=microworld or eval=perp"),
        ("eval.tasks={a:1}", "eval.tasks={a:1}: must be a list"),
        ("adapter=[1]", "adapter=[1]: must be a mapping"),
        ("sparsity=1.5", "sparsity=1.5: allowed is a number with 0 <= sparsity < 1"),
        ("train.learning_rate=1e400", "train.learning_rate=1e400: must be a number > 0; infinity and NaN are none"),
        (
            "experiment=sparsity_sweep",
            "experiment=sparsity_sweep: is a sweep; must be run with -m, as in run.py -m exp",
        ),
        ("only=failed", "only=failed: must be null without -m; it chooses among the jobs of a sweep"),
        ("launch=torchrun seed=-1", "seed=-1: must be a whole number >= 0"),
        ("--config-dir=/no/such seed=0", "Additional config directory '/no/such' not found"),
        (
            "-m seed=0,1 train.steps=4,0",
            "train.steps=0: must be a whole number >= 1",
            "(in the job seed=0 train.steps=0)",
        ),
        ("method=lors -m seed=0,1 only=all", "only=all: must be one of failed, missing, or null (in the job method="),
        ("-m seed=glob(*)", "seed=glob(*): must match something"),
        (
            "-m seed=0,1 data=alpaca data.path=/no/such.jsonl",
            "data.path=/no/such.jsonl: no such file (in the job seed=0",
        ),
        ("-m method=lora,sora method.peft.init=kaiming", "method.peft.init=kaiming: no such key"),
    ),
    Bad(
        "command line",
        ("--config-dir={here}", "method=mine"),
        ("{here}/method/mine.yaml:2: must be YAML",),
        files={"method/mine.yaml": "a: [1\n"},
    ),
    Bad(
        "command line",
        ("--config-dir={here}", "-m", "experiment=mine"),
        ("hydra.sweeper.blocks.a=3: must be a mapping",),
        files={"experiment/mine.yaml": "# @package _global_\nhydra: {sweeper: {blocks: {a: 3}}}\n"},
    ),
    *entries(
        "command line",
        ("methd=lors", "methd=lors: no such key; did you mean method?"),
        ("method=", "method=: must be one of flat_lora, full, "),
        ("-m experiment=zeroshot", "experiment=zeroshot: must be one of ablation_lors, ", "zero_shot"),
        ("experiment=smoke", "experiment=smoke: is a sweep; must be run with -m"),
        ("prune=wanda prune.group=row", "prune.group=row: no such key here; prune=magnitude has it"),
        ("train=nothing", "train=nothing: must be one of alpaca, default, slimpajama"),
        ("launch=slurm", "launch=slurm: must be one of accelerate, python, torchrun"),
        ("hydra.foo=1", "hydra.foo=1: no such key"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm: must be one of basic"),
        ("+seed=3", "+seed=3: no such key; did you mean seed?"),
        ("--config-name=other", "Cannot find primary config 'other'"),
        ("-m method=glob(zz*)", "method=glob(zz*): must match something"),
        ("-m experiment=sparsity_sweep sparsity=2", "sparsity=2: allowed is a number", "experiment=sparsity_sweep)"),
        ("-m experiment=ablation_lors model=hf", "model.path: must be given", "(in the job "),
        ("-m experiment=smoke hydra.sweeper.blocks.x=null", "hydra.sweeper.blocks.x=null: no such key"),
        ("launch=accelerate model=hf model.path=/no/such", "model.path=/no/such: no such folder"),
        ("eval=zeroshot data=alpaca", "eval.tasks=boolq,rte,hellaswag", "cannot be loaded", "eval.data_root=FOLDER"),
        ("-m seed=0,1 model=hf,microworld model.path=/no/such", "model.path=/no/such: must be microworld here"),
        slow=True,
    ),
    *(
        Bad("command line", ("--config-dir={here}", "method=mine"), says, files={"method/mine.yaml": text}, slow=True)
        for text, *says in (
            ("", "method._target_: must be given"),
            ("- a\n- b\n", "method=[a, b]: must be a mapping"),
            ("_target_: nowhere.Method\nname: mine\n", "method._target_=nowhere.Method: must be the name of a class"),
            ("_target_: collections.OrderedDict\nname: mine\n", "method._target_=collections.OrderedDict: must be"),
            ("name: mine\nname: other\n", "{here}/method/mine.yaml:2: must be YAML (found duplicate key name)"),
            (b"\xff\xfe\x00name: a\n", "{here}/method/mine.yaml: must be UTF-8 text"),
        )
    ),
    *(
        Bad("command line", ("--config-dir={here}", *words), says, files={f"{file}.yaml": text}, slow=True)
        for words, file, text, *says in (
            (
                ("model=mine",),
                "model/mine",
                "name: mine\npath: x\nsize: 3\n",
                "model.size: no such key; model has name",
            ),
            (("model=mine",), "model/mine", "name: mine\npath: x\n", "model.revision: must be given"),
            (("models=mine",), "models/mine", "name: mine\n", "models=mine: no such key; did you mean model"),
            (
                ("experiment=mine",),
                "experiment/mine",
                "# @package _global_\ntrain: {step: 3}\n",
                "train.step: no such key",
            ),
        )
    ),
]


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
