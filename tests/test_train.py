"""Training: resuming bit for bit, checkpoints that are damaged, numbers that are not finite, the recipe."""

import copy
import json
import math
from itertools import chain

import pytest
import torch
from callback_loop import with_callbacks
from conftest import make_tiny_llama, make_tokenizer, recipe
from peft import LoraConfig
from transformers import TrainerCallback

from baselines.full import FullMethod
from harness.checkpoints import newest_intact
from harness.data import IGNORED, collator
from harness.meter import Meter
from harness.method import Method, adapt
from harness.recipe import batch_loss, causal_lm_loss, target_count
from harness.sealed_folder import seal
from harness.train import NonFiniteLoss, train

RECIPE = recipe()
TOKENIZER = make_tokenizer()
TIMES = ("ms", "forward_ms", "backward_ms", "optimizer_ms", "warmup")


def rows(count=10):
    """Rows of different lengths, some without a target here and there; ten make an epoch of 2.5 steps."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for i in range(count):
        ids = torch.randint(3, 64, (3 + i * 7 % 8,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [IGNORED, IGNORED if i % 3 else ids[1], *ids[2:]]})
    return result


def lora(dropout=0.1, **fields):
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    return Method(name="lora", peft=config, **fields)


def full(**fields):
    return FullMethod("full", **fields)


def adapted(method, cfg=RECIPE):
    dtype = torch.float32 if cfg.precision == "float32" else torch.bfloat16
    return adapt(method, make_tiny_llama().to(dtype), precision=cfg.precision)


def fit(method, directory, cfg=RECIPE, model=None, data=None, seed=0):
    """Train a fresh model; returns it with its outcome."""
    model = model or adapted(method, cfg)
    pad = collator(TOKENIZER, "longest", cfg.sequence_length)
    return model, train(model, data or rows(), pad, cfg, method, Meter(1), directory, seed)


def without_times(history):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in history]


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


class Kill(TrainerCallback):
    """Dies before the update of the step after `step`, as if the process were killed there."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The training of the recipe: its model, its outcome and its folder."""
    folder = tmp_path_factory.mktemp("usual")
    return *fit(lora(), folder), folder


def kill_at(step, method, directory, cfg=RECIPE):
    with pytest.raises(KeyboardInterrupt):
        fit(with_callbacks(method, Kill(step)), directory, cfg)


def kill_at_the_last_checkpoint(method, directory, monkeypatch, cfg=RECIPE):
    """Die as soon as the checkpoint of the last step is sealed."""

    def dying(checkpoint):
        seal(checkpoint)
        if checkpoint.name == f"checkpoint-{cfg.steps}":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("harness.checkpoints.seal", dying)
        fit(method, directory, cfg)


# ---- resuming


@pytest.mark.parametrize(
    ("method", "precision"),
    [(lora(), "float32"), (lora(), "bf16"), (lora(), "bf16_mixed"), (full(), "float32"), (full(), "bf16_mixed")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, method, precision):
    """Killed in the second epoch, a step after a checkpoint: weights and losses end bit for bit equal."""
    cfg = recipe(precision=precision)
    whole, expected = fit(method, tmp_path / "whole", cfg)
    kill_at(5, method, tmp_path / "killed", cfg)
    assert len((tmp_path / "killed" / "steps.jsonl").read_text().splitlines()) == 5
    resumed, outcome = fit(method, tmp_path / "killed", cfg)
    assert_same_weights(whole, resumed)
    assert without_times(outcome.history) == without_times(expected.history)
    losses = expected.first_loss, expected.last_loss
    assert (outcome.first_loss, outcome.last_loss, outcome.steps) == (*losses, 7)


def test_without_any_intact_checkpoint_the_run_starts_over(usual, tmp_path):
    whole, expected, _ = usual
    kill_at(5, lora(), tmp_path / "killed")
    for checkpoint in (tmp_path / "killed").glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
    resumed, outcome = fit(lora(), tmp_path / "killed")
    assert_same_weights(whole, resumed)
    assert outcome.steps == expected.steps == 7


@pytest.mark.parametrize("steps", [7, 6], ids=["within an epoch", "at the end of an epoch"])
def test_a_finished_run_is_loaded_and_makes_no_further_step(tmp_path, steps):
    cfg = recipe(steps=steps)
    whole, expected = fit(lora(), tmp_path, cfg)
    random_state = torch.get_rng_state()
    again, outcome = fit(lora(), tmp_path, cfg)
    assert_same_weights(whole, again)
    assert outcome.history == expected.history
    assert torch.equal(torch.get_rng_state(), random_state)


class Memory(TrainerCallback):
    """Moves a weight by all that it has seen, and says what happens to it."""

    def __init__(self):
        self.seen = torch.zeros(())
        self.events = []

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

    def on_train_begin(self, *_, **__):
        self.events.append(("begin", self.seen.item()))

    def on_step_end(self, args, state, control, model, **_):
        with torch.no_grad():
            weight = next(p for p in model.parameters() if p.requires_grad)
            self.seen = 0.9 * self.seen + weight.norm()
            weight[0, 0] += 1e-3 * self.seen

    def on_train_end(self, args, state, control, model, **_):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad)[0, 1] += self.seen
        self.events.append(("end", state.global_step))


def remembering():
    return with_callbacks(lora(), Memory(), Memory())


@pytest.mark.parametrize("last", [False, True], ids=["a step after a checkpoint", "at the last checkpoint"])
def test_what_callbacks_hold_comes_back_with_every_checkpoint(tmp_path, monkeypatch, last):
    """Also where no step is left: their training begins and ends all the same."""
    method = remembering()
    whole, expected = fit(method, tmp_path / "whole")
    if last:
        kill_at_the_last_checkpoint(remembering(), tmp_path / "killed", monkeypatch)
    else:
        kill_at(5, remembering(), tmp_path / "killed")
    again = remembering()
    resumed, outcome = fit(again, tmp_path / "killed")
    assert_same_weights(whole, resumed)
    assert without_times(outcome.history) == without_times(expected.history)
    assert [callback.seen for callback in again.callbacks()] == [callback.seen for callback in method.callbacks()]
    for callback in again.callbacks():
        assert [event for event, _ in callback.events] == ["begin", "end"]
        assert callback.events[0][1] > 0 and callback.events[1][1] == 7


def test_a_checkpoint_of_something_else_is_one_line(tmp_path):
    fit(lora(), tmp_path)
    for other in (full(), with_callbacks(lora(), Memory())):
        with pytest.raises(ValueError, match="checkpoint-7: is no checkpoint of this method on this model; delete it"):
            fit(other, tmp_path)


def test_a_tiny_part_of_an_epoch_is_one_step(tmp_path):
    _, outcome = fit(lora(), tmp_path, recipe(steps=None, epochs=1e-9))
    assert outcome.steps == 1


def test_two_checkpoints_are_kept_and_none_without_an_interval(usual, tmp_path):
    # The last step is always a checkpoint.
    assert {path.name for path in usual[2].glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-7"}
    fit(lora(), tmp_path / "none", recipe(checkpoint_every=None))
    assert not list((tmp_path / "none").glob("checkpoint-*"))


def test_the_steps_file_is_the_history(usual):
    _, outcome, folder = usual
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert lines == outcome.history
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "tokens", *TIMES}


# ---- not a number


class Poison(TrainerCallback):
    """Puts a value into a trainable parameter after the update of one step."""

    def __init__(self, step, value):
        self.step = step
        self.value = value

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path, value):
    with pytest.raises(NonFiniteLoss, match="training stopped at step 4: the loss is nan") as caught:
        fit(with_callbacks(lora(dropout=0.0), Poison(3, value)), tmp_path)
    assert caught.value.step == 4
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert newest_intact(tmp_path).name == "checkpoint-2"


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    model = adapted(lora())
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match="training stopped at step 1: the gradient norm is") as caught:
        fit(lora(), tmp_path, model=model)
    assert caught.value.step == 1
    assert (tmp_path / "steps.jsonl").read_text() == ""


# ---- the recipe


def test_the_rate_warms_up_peaks_and_ends_on_the_floor(usual):
    rates = [line["lr"] for line in usual[1].history]
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, *cosine])
    assert rates[-1] == pytest.approx(1e-3)


def test_accumulated_micro_batches_are_one_large_batch(tmp_path):
    """Rows differ in length, so a mean of means would be another loss."""
    small, one = fit(lora(dropout=0.0), tmp_path / "small", recipe(batch_size=1, gradient_accumulation=4), data=rows(8))
    large, other = fit(
        lora(dropout=0.0), tmp_path / "large", recipe(batch_size=4, gradient_accumulation=1), data=rows(8)
    )
    assert [line["loss"] for line in one.history] == pytest.approx([line["loss"] for line in other.history], rel=1e-5)
    for (name, a), b in zip(small.named_parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_the_loss_is_the_mean_over_all_targets_of_the_step(tmp_path):
    data = rows(4)
    _, outcome = fit(lora(dropout=0.0), tmp_path, data=data)
    model = make_tiny_llama()  # B = 0, so the first step sees the plain model
    losses, targets = 0.0, 0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        log_probabilities = model(ids).logits[0].log_softmax(-1)
        for position, label in enumerate(labels[1:]):
            if label != IGNORED:
                losses -= log_probabilities[position, label].item()
                targets += 1
    assert outcome.first_loss == pytest.approx(losses / targets, rel=1e-5)


def test_one_shifted_loss_for_training_and_measuring():
    model = make_tiny_llama()
    batch = collator(TOKENIZER, "fixed", 10)(rows(5))
    own = batch_loss(model, batch)
    torch.testing.assert_close(own, model(**batch).loss)
    method = full()
    method.penalty = lambda _: own
    torch.testing.assert_close(batch_loss(model, batch, micro_batches=2, method=method) * 2, 2 * own)
    method.objective = lambda model, batch: 3 * own
    torch.testing.assert_close(batch_loss(model, batch, micro_batches=2, method=method) * 2, 3 * own)
    half = causal_lm_loss(model(**batch).logits.bfloat16(), batch["labels"], target_count(batch["labels"]))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_penalty_is_added_once_per_step(tmp_path, accumulation):
    def penalty(model):
        return 3 + sum((p**2).sum() for n, p in model.named_parameters() if "lora_A" in n)

    cfg = recipe(gradient_accumulation=accumulation, max_grad_norm=None)
    plain, without = fit(lora(dropout=0.0), tmp_path / "without", cfg)
    method = lora(dropout=0.0)
    method.penalty = penalty
    pulled, added = fit(method, tmp_path / "with", cfg)
    start = penalty(adapted(lora(dropout=0.0))).item()
    assert added.first_loss - without.first_loss == pytest.approx(start, rel=1e-5)
    assert penalty(pulled) < penalty(plain)


def test_gradients_are_clipped_or_not(tmp_path):
    def sgd(model, cfg):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    moved = {}
    for limit in (1e-3, None):
        method = lora(dropout=0.0)
        method.optimizer = sgd
        cfg = recipe(steps=1, warmup_steps=0, learning_rate=1.0, minimum_learning_rate=0.0, max_grad_norm=limit)
        before = adapted(method)
        after, outcome = fit(method, tmp_path / str(limit), cfg, model=copy.deepcopy(before))
        change = [(a - b).norm() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
        moved[limit] = torch.stack(change).norm().item()
        assert outcome.history[0]["grad_norm"] > 1e-3  # before clipping
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[None] == pytest.approx(outcome.history[0]["grad_norm"], rel=1e-3)


def test_activation_checkpointing_changes_nothing_but_memory(usual, tmp_path):
    plain, one, _ = usual
    saving, other = fit(lora(), tmp_path / "saving", recipe(activation_checkpointing=True))
    assert [line["loss"] for line in one.history] == [line["loss"] for line in other.history]
    assert_same_weights(plain, saving)


@pytest.mark.parametrize("precision", ["float32", "bf16_mixed"])
def test_the_loss_in_chunks_of_tokens_trains_alike(tmp_path, precision):
    plain, one = fit(lora(), tmp_path / "plain", recipe(precision=precision))
    chunked, other = fit(lora(), tmp_path / "chunked", recipe(precision=precision, logits_at_once=3))
    losses = [[line["loss"] for line in outcome.history] for outcome in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if precision == "float32" else 1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    tokens = torch.tensor([[3, 4]])
    assert chunked(tokens).logits.shape == plain(tokens).logits.shape, "the head is back"


@pytest.mark.parametrize("precision", ["float32", "bf16_mixed", "bf16"])
def test_precisions_keep_their_formats_and_leave_no_wrapper(tmp_path, precision):
    model, outcome = fit(lora(), tmp_path, recipe(precision=precision))
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert frozen == {torch.float32 if precision == "float32" else torch.bfloat16}
    assert outcome.last_loss < outcome.first_loss + 0.5
    assert "forward" not in vars(model)
    assert model(torch.tensor([[3, 4]])).logits.dtype == next(iter(frozen))
    assert model.config.use_cache is True


def test_steps_or_epochs(tmp_path):
    _, outcome = fit(lora(), tmp_path, recipe(steps=None, epochs=3, checkpoint_every=None))
    assert outcome.steps == 9  # ten rows are two steps of four and one of two
    assert [line["tokens"] for line in outcome.history].count(sum(len(r["input_ids"]) for r in rows())) == 0
    assert sum(line["tokens"] for line in outcome.history) == 3 * sum(len(r["input_ids"]) for r in rows())


def test_the_order_of_the_rows_depends_on_the_seed_alone(tmp_path):
    def order(method, seed, name):
        seen = []

        pad = collator(TOKENIZER, "longest", 10)

        def recording(batch):
            seen.append([row["input_ids"] for row in batch])
            return pad(batch)

        train(adapted(method), rows(), recording, RECIPE, method, Meter(1), tmp_path / name, seed)
        return seen

    first = order(lora(), 0, "a")
    assert first == order(full(), 0, "b")
    assert first != order(lora(), 1, "c")
    assert sorted(str(ids) for ids in chain.from_iterable(first[:5])) == sorted(str(row["input_ids"]) for row in rows())
