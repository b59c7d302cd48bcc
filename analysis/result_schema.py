"""What the analysis reads of a `result.json`, as types: a result of another shape is refused before anything is read.

Fields that no analysis reads are not listed, and may be anything.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from analysis.style import END_STATES

__all__ = ["MACHINE", "check"]

SCHEMA = 1
# Runs that differ in one of these do not share a table: what they were measured on, and with.
MACHINE = ("device", "threads", "processes", "torch", "transformers", "peft", "lm_eval", "datasets")
Number, Text = float | None, str | None
Kind = Literal["cuda", "live_tensors", "simulated"]
EndState = Literal[("merged", *END_STATES)]


def _part(**types: Any) -> type[BaseModel]:
    """An object with these fields, each a type, or a type and a default; nothing is converted."""
    fields = {name: kind if isinstance(kind, tuple) else (kind, ...) for name, kind in types.items()}
    return create_model("Part", __config__=ConfigDict(strict=True), **fields)


Score = _part(metric=str, value=Number, stderr=Number, acc_norm=(Number, None),
              correct=(Annotated[str, Field(pattern="^[01]*$")], ""),
              margin=(Number, None), margin_stderr=(Number, None), margins=(list[float], []))  # fmt: skip
Average = _part(metric=str, value=Number, stderr=Number, tasks=list[str])
Loss = {"value": Number, "loss": Number, "loss_stderr": Number, "losses": (list[float], [])}
Perplexity, Answers = _part(text=str, window=float, **Loss), _part(targets=list[int], **Loss)
Scores = _part(tasks=dict[str, Score], average=Average | None, perplexity=Perplexity | None,
               held_out=(Answers | None, None)) | None  # fmt: skip
Zeros = _part(**dict.fromkeys(("after_prune", "after_merge", "lost", "gained"), Number)) | None
Count = Annotated[str, Field(pattern="^[1-9][0-9]*$")]
Peaks = dict.fromkeys(("train_peak", "init_peak", "eval_peak"), Number)
Peaks |= dict.fromkeys(("prune_peak", "host_peak"), (Number, None)) | {"format": (Text, None)}
Peaks |= {"train_peak_by_devices": (dict[Count, int] | None, None)}
Speed = dict.fromkeys(("forward_ms", "backward_ms", "optimizer_ms", "tokens_per_second"), Number)
Lengths = dict.fromkeys(("batch_size", "gradient_accumulation", "sequence_length"), int)
Environment = _part(**dict.fromkeys(("python", "git_commit", "end", *MACHINE), Text)
                    | {"threads": int | None, "processes": (int, 1)},
                    git_dirty=bool | None, command=(list[str], []))  # fmt: skip
# Keys that are not here are compared, whatever they are.
Config = _part(
    name=str,
    adapter=_part(r=int),
    model=_part(name=Text, path=Text),
    prune=_part(name=Text),
    method=_part(name=str, peft=(dict[str, Any] | None, None)),
    data=_part(name=Text),
    train=_part(steps=int | None, epochs=Number, learning_rate=float, precision=str, **Lengths),
    eval=_part(name=Text, limit=int | None, add_bos_token=bool | None),
    simulate=(_part(device=str, shards=int) | None, None),
)
Result = _part(
    **dict.fromkeys(("key", "method", "model", "pruner", "pattern"), str),
    status=Literal["ok", "oom", "failed"],
    mode=Literal["run", "profile", "simulate"],
    error=_part(type=str, message=str) | None,
    sparsity=float,
    seed=int,
    support=(_part(sha256=str) | None, None),
    provenance=(dict[str, dict[str, Any]] | None, None),
    config=Config,
    environment=Environment,
    end_state=EndState | None,
    eval=Scores,
    zeros=Zeros,
    parameters=_part(**dict.fromkeys(("trainable", "total", "adapter_bytes"), Number)) | None,
    memory=_part(kind=Kind | None, breakdown=dict[str, int] | None, **Peaks),
    time=_part(step_ms=_part(p10=float, p50=float, p90=float) | None, **Speed),
    flops=_part(per_step=Number),
    loss=_part(first=Number, last=Number),
    baselines=_part(dense=Scores, pruned=Scores),
    variants=dict[EndState, _part(eval=Scores, zeros=Zeros)],
)


def check(result: dict[str, Any]) -> None:
    """Raise ValueError with one line if this is no result of this version."""
    if result.get("schema") != SCHEMA:
        raise ValueError(f"schema {result.get('schema')}; this version reads {SCHEMA}")
    try:
        Result.model_validate(result)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"damaged, {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
