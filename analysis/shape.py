"""What the analysis reads of a result file, and of which type it has to be; nothing else in the file matters to it."""

from typing import Annotated, Any, Literal

from pydantic import StringConstraints, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 - pydantic refuses those of Python 3.11

__all__ = ["problem_of"]

Number = float | None
Text = str | None
Count = int | None


class Task(TypedDict):
    """Scores of one task; `correct` has a digit for each item."""

    metric: str
    value: Number
    stderr: Number
    acc_norm: NotRequired[Number]
    correct: NotRequired[Annotated[str, StringConstraints(pattern="^[01]*$")]]


class Average(TypedDict):
    """Mean over tasks."""

    metric: str
    value: Number
    stderr: Number
    tasks: list[str]


class Perplexity(TypedDict):
    """Of a text; `losses` has a number for each window."""

    text: str
    value: Number
    loss: Number
    loss_stderr: Number
    window: Count
    losses: NotRequired[list[float]]


class Scores(TypedDict):
    """Of one model."""

    tasks: dict[str, Task]
    average: Average | None
    perplexity: Perplexity | None


class Zeros(TypedDict):
    """Before and after the fine-tuning."""

    after_prune: Number
    after_merge: Number
    lost: Count
    gained: Count
    pattern_valid: bool | None


class Variant(TypedDict):
    """Another end state."""

    eval: Scores | None
    zeros: Zeros | None


class Error(TypedDict):
    type: str
    message: str


class Parameters(TypedDict):
    total: Count
    trainable: Count
    adapter_bytes: Count


class StepTime(TypedDict):
    p10: float
    p50: float
    p90: float


class Support(TypedDict):
    sparsity: float
    pattern: str
    sha256: str


class Baselines(TypedDict):
    dense: Scores | None
    pruned: Scores | None


class Artifacts(TypedDict):
    steps: Text


class Flops(TypedDict):
    per_step: Number


class Loss(TypedDict):
    first: Number
    last: Number


class Environment(TypedDict):
    """Machine and code."""

    python: Text
    torch: Text
    transformers: Text
    peft: Text
    lm_eval: Text
    datasets: Text
    device: Text
    threads: Count
    git_commit: Text
    git_dirty: bool | None
    end: Text
    command: NotRequired[list[str] | None]


class Memory(TypedDict):
    """Peaks in bytes."""

    kind: Literal["cuda", "live_tensors", "simulated"] | None
    train_peak: Count
    init_peak: Count
    eval_peak: Count
    reserved_peak: Count
    process_rss_peak: Count
    breakdown: dict[str, int] | None


class Time(TypedDict):
    """Of the steps, in milliseconds, and of the phases, in seconds."""

    warmup_steps: Count
    steps: Count
    step_ms: StepTime | None
    forward_ms: Number
    backward_ms: Number
    optimizer_ms: Number
    tokens_per_second: Number
    phases: dict[str, float]


class Config(TypedDict):
    """The resolved config: its groups, and the values that more than their equality matters of."""

    name: str
    model: TypedDict("Model", {"name": str, "path": Text})
    prune: TypedDict("Prune", {"name": str, "samples": NotRequired[Count], "sequence_length": NotRequired[Count]})
    method: TypedDict("Method", {"name": str})
    adapter: TypedDict("Adapter", {"r": Any})
    data: TypedDict("Data", {"name": str})
    eval: TypedDict("Eval", {"name": str, "add_bos_token": bool | None, "limit": Any})
    train: TypedDict("Train", {"learning_rate": float, "steps": Count, "epochs": Number, "batch_size": int,
                               "sequence_length": int})  # fmt: skip


class Result(TypedDict):
    """A whole file."""

    key: str
    status: Literal["ok", "failed", "oom"]
    error: Error | None
    mode: Literal["run", "profile", "simulate"]
    method: str
    model: str
    pruner: str
    pattern: str
    sparsity: float
    support: NotRequired[Support | None]
    seed: int
    config: Config
    environment: Environment
    parameters: Parameters | None
    end_state: Text
    zeros: Zeros | None
    memory: Memory
    time: Time
    flops: Flops
    loss: Loss
    eval: Scores | None
    baselines: Baselines
    variants: dict[str, Variant]
    artifacts: Artifacts


RESULT = TypeAdapter(Result)


def problem_of(content: Any) -> str | None:
    """The first thing in a result that is missing or of another type; None if all is there."""
    try:
        RESULT.validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None
