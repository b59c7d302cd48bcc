"""A corpus of bad inputs: what a user may give to a run, and what the one line of the answer must contain.

Every entry has the words of a command line, in which ``{here}`` is a folder of its own, ``{sources}`` and ``{model}``
are the good files that all other keys refer to. The parts that the answer must have name the key, the value or the
file, and what is allowed. `test_bad_input.py` runs them all, those of `bad_models.py` and `bad_command_lines.py` too;
what can be wrong inside a file is in `test_data.py` and `test_evaluate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        given: Overrides, or arguments of the command line.
        says: Parts of the answer; it begins with the first.
        files: Files below ``{here}`` that are written first; None is a folder.
        model: Changes to a copy of the good model, which is ``{here}/model`` then.
        environment: Variables.
        free: Bytes of memory that the machine has; None: as it is.
        slow: Whether the answer takes seconds.
    """

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
        extra = [*self.files, *(change.__name__ for change in self.model or ()), *self.environment]
        return ascii(" ".join([*self.given, ", ".join(extra)])).strip("'\" ")[:150]


def entries(*lines: tuple, **options: object) -> list[Bad]:
    """Entries from ``(words, part, part, ...)``; words in one text are apart by blanks."""
    words = (line[0].split() if isinstance(line[0], str) else line[0] for line in lines)
    return [Bad(tuple(given), line[1:], **options) for given, line in zip(words, lines, strict=True)]


def same_answer(table: Mapping[str, str]) -> list[Bad]:
    """Entries from ``answer: values``: ``key=value: answer`` for each; other words stand before it, behind commas."""
    found = []
    for answer, values in table.items():
        for words in (value.split(";") for value in values.split()):
            found.append(Bad(tuple(words), (f"{words[-1].lstrip('+')}: {answer}",)))
    return found


COUNT, PLACE = "must be a whole number >= 1", "must be a folder below runs_root"
NO_TEXT = "without line breaks and other control characters"

# One value of every key that is not of its type, or out of its range.
VALUES = [
    *same_answer(
        {
            COUNT: "simulate.shards=0 adapter.r=0 prune.samples=0 prune=sparsegpt;prune.block_size=0 train.steps=0 "
            "train.steps=1.5 train.steps=abc train.steps=2;train.steps_by_mode.run=0 train.batch_size=0 "
            "train.steps=2;train.steps_by_mode.profile=0 train.gradient_accumulation=0 train.init_rows=0 "
            "eval.batch_size=auto train.batch_size=8.0 +method.version=0",
            "must be a whole number >= 1, or null": "model.layers=0 +method.init_rows=0 data.limit=0 eval.limit=0 "
            "train.checkpoint_every=0",
            "must be a whole number >= 2": "prune.sequence_length=1 train.sequence_length=1 eval.perplexity.window=1",
            "must be a whole number >= 0": "prune=magnitude;prune.samples=-1 prune=magnitude;prune.sequence_length=-1 "
            "train.warmup_steps=-1 train.timing_warmup=-1 seed=1.0 seed=true",
            "must be a whole number >= 0 and <= 4294967295": "seed=-1 seed=4294967296 prune.seed=5000000000",
            "must be a number > 0": "adapter.alpha=0 train.learning_rate=0 train.learning_rate=fast",
            "must be a number > 0; infinity and NaN are none": "train.learning_rate=inf train.learning_rate=nan",
            "must be a number > 0, or null": "train.epochs=0 train.max_grad_norm=0",
            "must be a number >= 0": "prune=sparsegpt;prune.damping=-0.1 train.minimum_learning_rate=-1 "
            "train.weight_decay=-0.1",
            "must be a number >= 0, or null": "+method.max_grad_norm=-1",
            "must be true or false": "force=maybe force=1 save_merged=null save_base=1 "
            "train.activation_checkpointing=yes +method.trains=0 eval.add_bos_token=null eval.baselines=3",
            "must be true or false, or null": "+method.keep_zeros=maybe",
            "must be a text": "name=3 runs_root=null model.path=null data.split=null eval.perplexity.text=null "
            "method.name=3 data.name=3 eval.name=3 launch.name=3",
            "must be a text, or null": "cache_root=true model.name=7 prune.text=5 data.path=3 eval.data_root=true",
            "must be a list, each entry a text": "eval.tasks=rte launch.arguments=3",
            "must be a list, each entry a text, or null": "+method.merges=dense",
            "must be a list, each entry one of tensorboard, wandb, mlflow, or null": "train.report_to=[comet]",
            "must be all-linear, or a non-empty list, each entry a text": "adapter.targets=[] adapter.targets=q_proj "
            "adapter.targets=[1]",
            "must be a list of 2, each entry a number >= 0 and < 1": "train.betas=[0.9]",
            "must be a mapping": "adapter=null simulate=3 train.steps=2;train.steps_by_mode=null",
            "must be a mapping, or null": "model.shape=[1] eval.perplexity=wikitext method.peft=abc",
            "must be one of run, profile, simulate": "mode=simulated mode=null",
            "must be one of failed, missing, or null": "only=all",
            "must be one of cuda, cpu": "simulate.device=tpu",
            "must be one of none, magnitude, wanda, sparsegpt": "prune.name=random",
            "must be one of layer, row": "prune=magnitude;prune.group=block",
            "must be one of microworld, instruction, text": "data.kind=images",
            "must be one of all, answer": "data.loss_on=question",
            "must be one of alpaca, question, chat, or null": "data.template=vicuna",
            "must be one of float32, bfloat16, or null": "model.dtype=float16",
            "must be one of eager, sdpa, flash_attention_2, flex_attention, or null": "model.attn_implementation=a/b",
            "must be one of longest, fixed": "train.pad=left",
            "must be one of test, validation": "+eval.split=dev",
            "must be one of float32, bf16_mixed, bf16": "train.precision=fp8",
            PLACE: "name=../../x name=/abs name=a/../b name=a//b name=.",
        }
    ),
    *entries(
        ("train.tuned.sqft=0", "train.tuned=", "must be a mapping, or null"),
        ("sparsity=1", "sparsity=1: allowed is a number with 0 <= sparsity < 1"),
        ("sparsity=half", "sparsity='half': allowed is a number with 0 <= sparsity < 1"),
        ("pattern=4:2", "pattern='4:2': allowed are unstructured and 'n:m'"),
        ("seed='0'", "seed=0: must be a whole number >= 0"),
        ("train.betas=[0.9,1]", "train.betas=[0.9, 1]: must be a list of 2, each entry a number >= 0 and < 1"),
        ("adapter.alpha=1e400", "adapter.alpha=inf: must be a number > 0; infinity and NaN are none"),
        ("model.revision=12e4567", "model.revision=inf: must be a text, or null", "quotes inside quotes"),
        ("prune.samples=99999999999999999999", "prune.samples=99999999999999999999: " + COUNT, "too large"),
        (["name=' '"], "name= : must be a text that is not blank"),
        (["name='a\nb'"], r"name=a\nb: must be a text", NO_TEXT),
        (["name='a\udcffb'"], r"name=a\udcffb: must be a text", NO_TEXT),
        ("name=" + "x" * 300, "name=xxx", "names have at most 200 bytes each"),
        ("cache_root=" + "a/" * 1500, "cache_root=a/a/", "2000 together"),
        (["runs_root='~nobody-of-this-name/x'"], "runs_root=~nobody-of-this-name/x: must be a folder of a user that"),
        ("seed={a:1}", "seed={a: 1}: must be a whole number >= 0"),
        ("~train.batch_size", "train.batch_size: must be given; it is missing in the config"),
        ("model.path=???", "model.path: must be given, as in model.path=VALUE"),
        ("train.steps=${nowhere}", "train.steps=${nowhere}: must refer to something that exists", "'nowhere' not"),
        ("name=${name}", "name=${name}: must refer to something that exists (Recursive interpolation detected)"),
    ),
]

# Keys that no run has, which Hydra adds behind + and ++.
UNKNOWN = entries(
    ("++train.learning_rat=0.1", "train.learning_rat: no such key; did you mean train.learning_rate?"),
    ("+train.lr=0.1", "train.lr: no such key; did you mean train.learning_rate?"),
    ("+learning_rate=0.1", "learning_rate: no such key; did you mean train.learning_rate?"),
    ("+x=1", "x: no such key; the config has sparsity, pattern, seed"),
    ("++adapter.rank=3", "adapter.rank: no such key; adapter has r, alpha, targets"),
    ("+prune.damping=0.1", "prune.damping: no such key; prune has name, samples, sequence_length, seed, text"),
    ("+eval.perplexity.length=8", "eval.perplexity.length: no such key"),
    ("++method.peft.scalin=x", "method.peft.scalin: no such key; did you mean method.peft.scaling?"),
    ("method=sora +method.shrinkag=1", "method.shrinkag: no such key; did you mean method.shrinkage?"),
)

# Each value is allowed, together they are not.
TOGETHER = [
    *entries(
        ("sparsity=0.7 pattern=2:4", "sparsity=0.7 contradicts pattern='2:4'", "leave sparsity out"),
        ("method.peft.storage=n:m", "method.peft.storage=n:m: must be dense, bitmap or auto with pattern=unstructured"),
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
        ("data=microworld data.split=test", "data.split=test: must be train, the only split of microworld"),
        ("data.split=test", "data.split=test: must be train, the only split of {sources}/instructions.jsonl"),
        ("data=text data.path={sources}/text.jsonl data.loss_on=answer", "data.loss_on=answer: must be all for"),
        ("data.template=null", "data.template=", "must be alpaca, question or chat for data.kind=instruction"),
        (
            "data.template=chat",
            "data.template=chat: the tokenizer of the model has no chat template; must be alpaca or question",
        ),
        ("model.dtype=bfloat16", "model.dtype=bfloat16: must be float32 with train.precision=float32"),
        ("model.pad_token=xyzzy", "model.pad_token=xyzzy: must be a token that tokenizer and model know"),
        ("model.attn_implementation=flash_attention_2", "model.attn_implementation=flash_attention_2: cannot be had"),
        ("eval.tasks=[rte,rte]", "eval.tasks=[rte, rte]: must have each task once; rte is there twice"),
        ("+eval.split=validation", "eval.split=validation: must be test for rte"),
        ("mode=simulate method=none prune=none", "method=none: must be one that trains in mode=simulate if nothing is"),
        ("mode=simulate method=shira", "method=shira: must be one whose step needs no values"),
        ("mode=profile model.layers=3", "model.layers=3: must be at most 2, the layers of the model"),
        ("mode=profile model.shape={model_type:x}", "model.shape: describes no model (ValueError: "),
        ("train.sequence_length=129", "train.sequence_length=129: must be at most 128, the positions of model="),
        ("prune.sequence_length=129", "prune.sequence_length=129: must be at most 128, the positions of model="),
        ("eval.perplexity.window=129", "eval.perplexity.window=129: must be at most 128, the positions of model="),
        ("pattern=8:32", "pattern='8:32': groups of 32 do not divide the input width 48", "down_proj"),
        ("adapter.r=17", "adapter.r=17: must be at most 16; model.layers.0.self_attn.k_proj is 16 x 32"),
        ("adapter.targets=[q_proj,lm_hed]", "method=lors: target_modules: 'lm_hed'", "did you mean lm_head"),
    ),
    *entries(
        ("seed=0", "launch.processes=1: must be 2, the processes that there are (WORLD_SIZE)"),
        environment={"WORLD_SIZE": "2"},
    ),
    *entries(
        (
            "launch=torchrun",
            "launch.arguments: must not ask Accelerate for FSDP or DeepSpeed; launch.shard=true shards",
        ),
        environment={"ACCELERATE_USE_FSDP": "true"},
    ),
    *entries(
        ("launch.processes=2", "launch.processes=2: must be 1, the processes that there are (WORLD_SIZE)"),
        ("launch=torchrun launch.processes=3", "train.batch_size=16: must be a multiple of launch.processes=3"),
        ("launch=torchrun launch.processes=2 mode=simulate", "launch.processes=2: must be 1 in mode=simulate"),
        ("launch.shard=true", "launch.shard=true: must be false for one process"),
        (
            "method=geolora launch=torchrun launch.processes=2 launch.shard=true",
            "launch.shard=true: must be false for method=geolora, whose steps need whole weights",
        ),
        ("mode=simulate simulate.shards=2 method=geolora", "simulate.shards=2: must be 1 for method=geolora, whose"),
    ),
]

# What only the class of the method knows, for each method that has options.
METHODS = [
    *same_answer(
        {
            "must be the name of a class": "method._target_=collections.OrderedDict "
            "method.peft._target_=nowhere.Config method.peft._target_=null",
            "must be true or false": "method.peft.exact_gradient=1 method=lora;method.peft.use_rslora=yes "
            "method=sqft_gc;method.peft.checkpoint=1",
            "must be a whole number >= 1": "method=flat_lora;method.peft.interval=0 "
            "method=xgblora;method.peft.boosters=0 method=shira;adapter.r=3.5",
            "must be a whole number >= 1, or None": "method=lora_mini;method.peft.a=0",
            "must be a whole number >= 4": "method=geolora;method.peft.largest_rank=2",
            "must be a number > 0": "method=lora_rite;method.eps=-1",
            "must be a number, or null": "method=lora_rite;method.clip=abc",
            "must be a number > 0, or None": "method=lora_rite;method.skip=0 method=sora;method.gate_rate=0",
            "must be a number > 0 and <= 1": "method=rm_lora;method.peft.keep_rate=0",
            "must be a number >= 0": "method=flat_lora;method.peft.sigma=-1 method=sora;method.penalty_weight=-1",
            "must be a number >= 0 and < 1": "method=geolora;method.peft.tolerance=1 "
            "method=spp_gc;method.peft.dropout=1",
            "must be one number >= 0": "method=sora;method.shrinkage=-1",
            "must be a positive number": "method=sora;method.stage_steps=3",
            "must be 0": "method=mora;method.peft.dropout=0.1 method=sqft_fused;method.peft.dropout=0.1",
            "must be one of 1, 6": "method=mora;method.peft.mora_type=3",
            "must be below the 2 blocks": "method=sherl;method.peft.late_layers=2",
            "must be at most 32": "method=sherl;method.peft.reduction=64",
            "must be at most 2, the blocks": "method=xgblora;method.peft.drawn=1000",
            "": "method=spp;adapter.r=5",
        }
    ),
    *entries(
        ("method._target_=asyncio.windows_events.X", "method._target_=asyncio.windows_events.X: cannot be imported ("),
        ("~method.peft._target_", "method.peft={", "must be a mapping with a _target_, which names what it builds"),
        ("method.peft.init=svd", "method.peft.init='svd': must be one of gradient, kaiming"),
        ("+method.merges=[merged,folded]", "method.merges=folded: must be one or more of merged, adapter, remasked"),
        ("method=gelora method.estimator=mean", "method.estimator='mean': must be one of fit, likelihood"),
        ("method=lora_mini method.peft.outer=random", "method.peft.outer='random': must be one of"),
        ("method=rm_lora method.peft.penalty=l2", "method.peft.penalty='l2': must be one of"),
        ("method=sora method.shrinkage=[0,high]", "method.shrinkage=[0, high]: must be a number"),
        ("method=sqft method.peft.form=one", "method.peft.form='one': must be one of two_products, fused"),
        ("method=hira method.peft.hira_dropout=2", "method=hira: ", "dropout probability", "2"),
        ("method=ia3 method.peft.target_modules=[qproj]", "method=ia3: ", "'qproj'"),
        ("method=sherl method.merges=null", "method.merges=[merged]: must be [adapter]"),
        ("method=full +method.lr=1", "method.lr: no such key"),
        ("method=none method.trains=true", "method.trains=True: must be false for a method with neither peft nor"),
    ),
]


def file(key: str, name: str, content: str | bytes | None, *says: str, given: str = "") -> Bad:
    """A file that is not as it should be; ``key`` is the key that names it."""
    words = (f"{key}={{here}}/{name}", *given.split())
    return Bad(words, (key, f"{{here}}/{name}", *says), files={name: content})


# Sources of rows and text, and folders that cannot be used.
FILES = [
    *entries(
        ("data.path=/no/such.jsonl", "data.path=/no/such.jsonl: no such file"),
        ("data=text data.path=/no/such.txt", "data.path=/no/such.txt: no such file"),
        ("prune.text=/no/such.jsonl", "prune.text=/no/such.jsonl: no such file"),
        ("prune.text=null", "prune.text=c4: no such file", "the data set on the Hub cannot be read"),
        ("eval.perplexity.text=/no/such.txt", "eval.perplexity.text=/no/such.txt: no such file"),
        ("eval.data_root=/no/such", "eval.data_root=/no/such/rte/validation.jsonl: no such file"),
        ("eval.tasks=[boolq]", "eval.data_root={sources}/boolq/validation.jsonl: no such file"),
        ("eval.data_root=null", "eval.tasks=rte: cannot be loaded", "eval.data_root=FOLDER"),
        ("train.sequence_length=8 data.loss_on=answer", "train.sequence_length=8: shorter than every prompt"),
        ("runs_root=/proc/nowhere", "runs_root: cannot write to /proc/nowhere"),
        ("cache_root=/proc/nowhere", "cache_root: cannot write to /proc/nowhere"),
    ),
    file("data.path", "cut.jsonl", '{"instruction": ', ":1: not valid JSON"),
    file("data.path", "none.txt", "", "less text than one block of train.sequence_length=128", given="data=text"),
    file("prune.text", "short.jsonl", '{"text": "cat"}', "holds 2 tokens; one sample of 32 needs"),
    file("prune.text", "packed.jsonl.gz", b"\x1f\x8b\x08\x00", "cannot be read ('utf-8' codec"),
    file("eval.perplexity.text", "number.jsonl", '{"text": 3}\n', "column 'text' of row 1 must be text, not 3"),
    *(
        Bad((f"{key}={{here}}/file",), (f"{key}: cannot write to {{here}}/file",), files={"file": ""})
        for key in ("runs_root", "cache_root")
    ),
    *(
        Bad(("cache_root={here}",), (f"cache_root: {{here}}/{name} must be a folder; it is a file",), files={name: ""})
        for name in ("tokens", "pruned", "scores", "devices")
    ),
]

# More than the memory holds.
MEMORY = [
    *entries(
        ("train.batch_size=100000", "train.batch_size=100000: must be smaller; a step of 24 x 128 tokens would need"),
        ("prune.samples=100000", "prune.samples=100000: must be smaller; what they are at one layer would need", "GiB"),
        free=5_000_000,
    ),
    *entries(
        ("mode=profile train.batch_size=1000000000", "train.batch_size=1000000000: must be smaller; the rows of a"),
        ("mode=profile train.steps=1000000000", "train.steps=1000000000: must be smaller; the rows of all steps would"),
    ),
]

IN_PROCESS = [*VALUES, *UNKNOWN, *TOGETHER, *METHODS, *FILES, *MEMORY]
