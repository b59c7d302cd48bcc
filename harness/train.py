"""Fine-tuning with Hugging Face's `Trainer`: one recipe for all methods, every step measured, a killed run
continued.

What the Trainer does is left to it: loop, accumulation, clipping, autocast, checkpoints with optimizer,
schedule and random state. Added here: the loss per target token and the schedule (`recipe`), marks for
the meter, one line of ``steps.jsonl`` per step, a stop at the first number that is not finite, and resuming
from the newest checkpoint that is intact (`checkpoints`). On a CPU a resumed training ends bit for bit where
an uninterrupted one does.

There is one way to resume, whatever is left of the training: the Trainer's, to the end, so that every callback
sees the training begin and end, if only to load what the last step has left. A callback that holds something from
one step to the next has the methods ``state_dict`` and ``load_state_dict`` of PyTorch's modules and optimizers; it
is saved with every checkpoint and restored with it. (The Trainer's own ``ExportableState`` would put new
callbacks behind the others, keeps no tensors, and confuses two of one class.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from harness.checkpoints import Seal, checkpoint_after, newest_intact, whole_or_gone
from harness.data import Collator, Row
from harness.deferred_head import deferred_by
from harness.files import write_text
from harness.meter import Meter
from harness.method import PRECISIONS, Method
from harness.processes import count, from_first, is_first
from harness.recipe import (
    InOneOrder,
    causal_lm_loss,
    cosine_with_floor,
    enable_activation_checkpointing,
    filled_up,
    gradient_clipping,
    target_count,
)
from harness.shards import after_backward, is_sharded, optimizer_state, spread
from lors.placement import full, write
from lors.storage import CompressedLinear

__all__ = ["MeasuredTrainer", "NonFiniteLoss", "TrainOutcome", "train"]

OPTIMIZER_NAME = "optimizer.pt"  # the Trainer's
WEIGHTS, CALLBACK = "trained.pt", "callback-{}.pt"


class NonFiniteLoss(ArithmeticError):  # noqa: N818 - named for what happened
    """The loss or the gradient norm of a step was NaN or infinite; the training stopped there.

    Attributes:
        step: Number of the step, from 1.
    """

    def __init__(self, step: int, what: str, value: float) -> None:
        super().__init__(f"training stopped at step {step}: the {what} is {value}")
        self.step = step


@dataclass(frozen=True)
class TrainOutcome:
    """What a training leaves besides the weights.

    Attributes:
        first_loss: Loss of the first step, before any update; mean per target token.
        last_loss: Loss of the last step.
        steps: Number of steps.
        history: One entry per step, the lines of ``steps.jsonl``: step, loss, gradient norm (before
            clipping), learning rate, tokens and times in milliseconds.
    """

    first_loss: float
    last_loss: float
    steps: int
    history: list[dict[str, Any]]


def train(
    model: nn.Module,
    data: Sequence[Row],
    collator: Collator,
    train_cfg: Any,
    method: Method,
    meter: Meter,
    output_dir: Path | str,
    seed: int,
    trackers: Sequence[TrainerCallback] = (),
) -> TrainOutcome:
    """Fine-tune an adapted model in place, on the device that it is on.

    A checkpoint in `output_dir` is continued, with whatever steps are left; there may be none.

    Args:
        model: The adapted model (`method.adapt`).
        data: Training rows; their order is drawn from `seed`.
        collator: Makes batches of rows.
        train_cfg: The recipe, the fields of ``conf/train``.
        method: Gives optimizer, callbacks and penalty where it has its own.
        meter: Measures the steps.
        output_dir: Folder for ``steps.jsonl`` and the checkpoints.
        seed: Order of the rows, dropout.
        trackers: Also get each line of ``steps.jsonl`` (`trackers.reporting`); a checkpoint holds nothing of them.

    Raises:
        ValueError: A checkpoint holds something else than this method trains.
        NonFiniteLoss: A loss or a gradient norm is NaN or infinite; no checkpoint was written since.
        OSError: A checkpoint could not be written; those before it are still there.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if train_cfg.activation_checkpointing:
        enable_activation_checkpointing(model)
    clipping = gradient_clipping(train_cfg, method)
    with deferred_by(model, train_cfg), _trainer_changes_undone(model):
        trainer = MeasuredTrainer(
            model=model,
            args=_arguments(train_cfg, clipping, output_dir, seed, next(model.parameters()).device),
            data_collator=collator,
            train_dataset=filled_up(data, train_cfg.batch_size) if count() > 1 else data,
            optimizers=(method.optimizer(model, train_cfg), None),
            callbacks=[meter, *method.callbacks(), _Progress(), Seal(), *trackers],
            recipe=train_cfg,
            meter=meter,
            method=method,
            steps_file=output_dir / "steps.jsonl",
        )
        trainer.remove_callback(PrinterCallback)
        history = trainer.run(from_first(lambda: newest_intact(output_dir)))
    return TrainOutcome(history[0]["loss"], history[-1]["loss"], len(history), history)


class MeasuredTrainer(Trainer):
    """The Trainer with the suite's loss and schedule; it tells the meter where forward and backward end."""

    def __init__(
        self,
        *,
        recipe: Any,
        meter: Meter,
        method: Method,
        steps_file: Path,
        **kwargs: Any,
    ) -> None:
        super().__init__(compute_loss_func=self._loss, **kwargs)
        self.history: list[dict[str, Any]] = []
        self._recipe = recipe
        self._meter = meter
        self._method = method
        self._steps_file = steps_file

    def run(self, checkpoint: Path | None) -> list[dict[str, Any]]:
        """Train to the end, from `checkpoint` if there is one, and return the whole history."""
        self._restore_history(checkpoint)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self.history

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        return InOneOrder(data, self.args.data_seed) if count() > 1 else super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | int | None]:
        """Nothing after the last step: resumed from there, the Trainer would make one more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            rounds = self._method.rounds(self.model)
            self.lr_scheduler = cosine_with_floor(optimizer or self.optimizer, self._recipe, num_training_steps, rounds)
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self._meter.mark("")
        self._meter.count_tokens(inputs["attention_mask"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        after_backward(self.model)
        self._meter.mark("backward")
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            loss = self._method.objective(self.model, inputs)
        if loss is not None:
            loss = loss * _share(inputs["labels"], kwargs.get("num_items_in_batch"))
        else:
            # Accelerate puts autocast around the forward pass of what it prepares, which shards are not.
            autocast = is_sharded(self.model) and self.args.bf16
            with torch.autocast(self.args.device.type, torch.bfloat16, enabled=autocast):
                loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._meter.mark("forward")
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what training changes: all trainable parameters, whole adapters and all buffers, of bare models
        likewise.

        PEFT's own format would not do: loading it turns bfloat16 adapters into float32, and it leaves out
        what is trained outside of an adapter. Beside it what callbacks hold.
        """
        changing = {name: full(tensor.detach()) for name, tensor in self._changing()}
        if not is_first():
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(changing, folder / WEIGHTS)
        for name, callback in self._stateful():
            torch.save(callback.state_dict(), folder / name)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if is_sharded(self.model):  # what was saved are the shards of one process
            state = optimizer_state(self.optimizer)
            from_first(lambda: torch.save(state, Path(output_dir) / OPTIMIZER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        spread(self.optimizer)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with whole_or_gone(checkpoint_after(self.args, self.state)):
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The Trainer's hook for the weights of a checkpoint, see `save_model`.

        The Trainer itself restores optimizer, schedule and counters; the random state only before a next batch, and
        there may be none.
        """
        folder, changing, stateful = Path(resume_from_checkpoint), dict(self._changing()), dict(self._stateful())
        saved = _load(folder / WEIGHTS)
        if _shapes(saved) != _shapes(changing) or not all((folder / name).exists() for name in stateful):
            raise ValueError(f"{folder}: is no checkpoint of this method on this model; delete it to start over")
        with torch.no_grad():
            for name, tensor in changing.items():
                write(tensor, saved[name]) if is_sharded(self.model) else tensor.copy_(saved[name])
        for name, callback in stateful.items():
            callback.load_state_dict(_load(folder / name))
        self._load_rng_state(resume_from_checkpoint)

    def _stateful(self) -> Iterator[tuple[str, Any]]:
        """Callbacks that hold something, and the names of their files."""
        for number, callback in enumerate(self.callback_handler.callbacks):
            if hasattr(callback, "state_dict"):
                yield CALLBACK.format(number), callback

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        # Where the values of a compressed weight are never changes.
        packed = tuple(f"{name}." for name, part in self.model.named_modules() if isinstance(part, CompressedLinear))
        yield from ((name, buffer) for name, buffer in self.model.named_buffers() if not name.startswith(packed))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: the Trainer's estimate walks all parameters, inside the step that is being timed."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record one step, called after every step and before its checkpoint."""
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        step = self.state.global_step
        for name, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise NonFiniteLoss(step, what, logs[name])
        line = {
            "step": step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            **self._meter.last(),
        }
        self.history.append(line)
        if is_first():
            with self._steps_file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
        super().log(dict(line), start_time)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Share of this micro-batch in the loss of the step; the penalty is shared out likewise."""
        targets = target_count(labels) if num_items_in_batch is None else num_items_in_batch
        loss = causal_lm_loss(outputs.logits, labels, targets, self.model.get_output_embeddings())
        penalty = self._method.penalty(self.model)
        if penalty is not None:
            loss = loss + penalty * _share(labels, targets)
        return loss

    def _restore_history(self, checkpoint: Path | None) -> None:
        """Write ``steps.jsonl`` anew, as of the checkpoint: what came after it never happened."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            self.history = [{k: v for k, v in line.items() if k != "epoch"} for line in state.log_history]
        if is_first():
            write_text(self._steps_file, "".join(json.dumps(line) + "\n" for line in self.history))


def _share(labels: Tensor, targets: Tensor | int | None) -> Tensor | float:
    """The share of a micro-batch in a step of so many targets; None: it is all of the step."""
    return 1.0 if targets is None else target_count(labels) / targets


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@contextmanager
def _trainer_changes_undone(model: nn.Module) -> Iterator[None]:
    """Undo what the Trainer leaves on a model: `use_cache` off, and autocast wrapped around `forward`."""
    use_cache, forward = model.config.use_cache, vars(model).get("forward")
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        if forward is not None:
            model.forward = forward


class _Progress(TrainerCallback):
    """A progress bar with the loss; the Trainer's own prints a line per step."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: Any
    ) -> None:
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()


def _arguments(
    train_cfg: Any, clipping: float | None, output_dir: Path, seed: int, device: torch.device
) -> TrainingArguments:
    every = train_cfg.checkpoint_every
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=-1 if train_cfg.steps is None else train_cfg.steps,
        num_train_epochs=1 if train_cfg.epochs is None else train_cfg.epochs,
        per_device_train_batch_size=train_cfg.batch_size // count(),
        gradient_accumulation_steps=train_cfg.gradient_accumulation,
        max_grad_norm=clipping or 0.0,
        bf16=PRECISIONS[train_cfg.precision].autocast,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no" if every is None else "steps",
        save_steps=1 if every is None else every,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # Several GPUs in one process would mean DataParallel, which no method is measured with.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
