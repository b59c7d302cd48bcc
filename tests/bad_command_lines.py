"""Bad command lines of run.py: arguments, and what is found once Hydra has composed them. See `bad_inputs`."""

from __future__ import annotations

from bad_inputs import COUNT, Bad, entries

NAMES = "must be name=value, and the name one of those in `python run.py --help`"
QUOTES = "must be name=value, with quotes around special characters"
OWN_FILE = "must stay as its file says; another method is another file in conf/method"
ARGUMENTS = entries(
    ("--steps=3", "--steps=3: no such flag; a value is set as name=value, without dashes"),
    ("--config-dir", "--config-dir : must be followed by a value"),
    ("--cfg jobs", "--cfg jobs: must be followed by job, hydra, all"),
    ("--version=3", "--version=3: must be --version without a value"),
    ("sparsity", "sparsity: " + QUOTES),
    ("train.steps=[1", "train.steps=[1: " + QUOTES),
    ("seed=" + "9" * 5000, "seed=999", "..."),
    ([""], "'': " + QUOTES),
    (["name=a\nb"], "name=a b: " + QUOTES),
    (["data.path=\udcff"], r"data.path=\udcff: " + QUOTES),
    ("=3", "=3: " + NAMES),
    ("method@x=lors", "method@x=lors: " + NAMES),
    ("seed=0,1", "seed=0,1: must be one value without -m; a list of values has brackets, [a,b]"),
    ("method=lors method=lora", "method=lora: must be there once; method is set twice"),
    ("-m seed=0,1 seed=2", "seed=2: must be there once; seed is set twice"),
    ("-m experiment=smoke,rank_sweep", "experiment=smoke,rank_sweep: must be one; every preset is a sweep of its own"),
    ("+method=lora", "+method=lora: must be method=lora; every group has an option already"),
    ("~train.steps", "~train.steps: must stay; a run needs every key"),
    ("method.peft=null", "method.peft=null: " + OWN_FILE),
    ("method={peft:{_target_:peft.LoraConfig}}", "method={peft:{_target_:peft.LoraConfig}}: " + OWN_FILE),
    ("+method.penalty={_target_:a.b}", "+method.penalty={_target_:a.b}: " + OWN_FILE),
)


def own_file(words: str, name: str, content: str | bytes, *says: str, slow: bool = False) -> Bad:
    """A config file of the user."""
    return Bad(("--config-dir={here}", *words.split()), says, files={f"{name}.yaml": content}, slow=slow)


COMPOSED = [
    *entries(
        ("-m method=lors,lrs", "method=lrs: must be one of flat_lora, full, ", "xgblora"),
        ("method=", "method=: must be one of flat_lora, full, "),
        ("trian.steps=3", "trian.steps=3: no such key; did you mean train.steps?"),
        ("method.peft.rank=3", "method.peft.rank=3: no such key; did you mean method.peft.r?"),
        ("adapter={r:3,x:4}", "adapter.x: no such key; did you mean adapter.r?"),
        ("eval=none eval.perplexity.text=a", "eval.perplexity.text=a: no such key here; eval=microworld or eval=perp"),
        ("+zzz.yyy=1 zzz.x=1", "zzz.x=1: no such key; `python run.py --help` lists the names"),
        ("eval.tasks={a:1}", "eval.tasks={a:1}: must be a list"),
        ("adapter=[1]", "adapter=[1]: must be a mapping"),
        ("train.learning_rate=1e400", "train.learning_rate=1e400: must be a number > 0; infinity and NaN are none"),
        ("experiment=smoke", "experiment=smoke: is a sweep; must be run with -m, as in run.py -m experiment=smoke"),
        ("only=failed", "only=failed: must be null without -m; it chooses among the jobs of a sweep"),
        ("launch=torchrun seed=-1", "seed=-1: must be a whole number >= 0"),
        ("--config-dir=/no/such seed=0", "Additional config directory '/no/such' not found"),
        ("-m seed=0,1 hydra.sweeper.blocks=3", "hydra.sweeper.blocks=3: must be a mapping of keys and values"),
        ("-m seed=glob(*)", "seed=glob(*): must match something"),
        ("-m seed=0,1 train.steps=4,0", f"train.steps=0: {COUNT}", "(in the job seed=0 train.steps=0)"),
        ("-m seed=0,1 data=alpaca data.path=/x.jsonl", "data.path=/x.jsonl: no such file (in the job seed=0"),
        ("-m method=lora,sora method.peft.init=kaiming", "method.peft.init=kaiming: no such key"),
    ),
    own_file("method=mine", "method/mine", "a: [1\n", "{here}/method/mine.yaml:2: must be YAML"),
    own_file("method=mine", "method/mine", b"\xff\xfe\x00a", "{here}/method/mine.yaml: must be UTF-8 text"),
    own_file("method=mine", "method/mine", "- a\n- b\n", "method=[a, b]: must be a mapping"),
    own_file("method=mine", "method/mine", "", "method._target_: must be given"),
    own_file("model=mine", "model/mine", "name: mine\npath: x\nsize: 3\n", "model.size: no such key; model has name"),
    own_file(
        "-m experiment=mine",
        "experiment/mine",
        "# @package _global_\nhydra: {sweeper: {blocks: {a: 3}}}\n",
        "hydra.sweeper.blocks.a=3: must be a mapping",
    ),
    *entries(
        ("hydra/launcher=slurm", "hydra/launcher=slurm: must be one of basic"),
        ("--config-name=other", "Cannot find primary config 'other'"),
        ("-m experiment=ablation_lors model=hf", "model.path: must be given", "(in the job "),
        ("launch=accelerate model=hf model.path=/no/such", "model.path=/no/such: no such folder"),
        ("-m seed=0,1 model=hf,microworld model.path=/no/such", "model.path=/no/such: must be microworld here"),
        slow=True,
    ),
]
