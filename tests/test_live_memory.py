"""Live tensor bytes against numbers worked out by hand, and the promise that measuring leaves no trace."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from conftest import make_tiny_llama
from peft import LoraConfig
from torch import nn

from baselines.full import FullMethod
from harness.data import collator, random_data
from harness.flops import count_inference_flops
from harness.live_memory import CATEGORIES, LiveTensors, forward_memory
from harness.meter import Meter, training_cost
from harness.method import Method, adapt
from harness.recipe import enable_activation_checkpointing
from harness.train import train

FLOAT = 4  # bytes
B, T, V = 3, 16, 64
RECIPE = SimpleNamespace(
    steps=3, epochs=None, batch_size=B, gradient_accumulation=1, sequence_length=T, learning_rate=1e-2,
    minimum_learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, betas=[0.9, 0.999], max_grad_norm=1.0,
    precision="float32", activation_checkpointing=False, logits_at_once=None, checkpoint_every=None,
)  # fmt: skip


def recipe(**fields):
    return SimpleNamespace(**(vars(RECIPE) | fields))


def lora(r=4, dropout=0.0):
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=r, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return Method(name="lora", peft=config)


def adapted(method=None, **fields):
    return adapt(method or lora(), make_tiny_llama(**fields))


def batch():
    return collator(None, "fixed", T)(random_data(V, RECIPE, seed=0)[:B])


def step_memory(model, method=None, **fields):
    return training_cost(model, batch(), recipe(**fields), method or lora())["memory"]


def step_flops(model, **fields):
    return training_cost(model, batch(), recipe(**fields), FullMethod("full"))["flops"]["per_step"]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- counted by hand


def test_peak_of_a_small_mlp():
    n, d, h, k = 5, 7, 11, 3
    x, W1, W2 = torch.randn(n, d), nn.Parameter(torch.randn(h, d)), nn.Parameter(torch.randn(k, h))
    live = LiveTensors()
    live.count([W1, W2], "weights")
    live.count([x], "other")
    with live:
        live.phase = "forward"
        loss = (torch.relu(x @ W1.t()) @ W2.t()).sum()
        # Alive: parameters, x, the output of relu (saved, its input is not), the loss.
        assert live.now == FLOAT * (h * d + k * h + n * d + n * h + 1)
        assert live.forward_ends() == FLOAT * (n * h + 1)
        live.phase = "backward"
        loss.backward()
    # Highest while relu goes backward: its saved output, the incoming and the outgoing gradient, and dW2; two
    # scalars are the loss and the 1 that the backward pass starts from.
    assert live.peak == FLOAT * (h * d + k * h + n * d + 3 * n * h + k * h + 2)
    assert live.at_peak().phase == "backward"
    live.count([W1.grad, W2.grad], "gradients")
    assert live.at_peak().by_category() == {
        "weights": FLOAT * (h * d + k * h),
        "adapters": 0,
        "gradients": FLOAT * k * h,
        "optimizer": 0,
        "activations": FLOAT * (n * h + 1),
        "transients": FLOAT * (2 * n * h + 1),
        "other": FLOAT * n * d,
    }


def test_views_are_free_freed_tensors_leave_and_sparse_ones_count():
    live = LiveTensors()
    with live:
        a = torch.zeros(100)
        b = a.view(10, 10).t()[2:]
        a.add_(1)
        assert live.now == 100 * FLOAT
        del a
        assert live.now == 100 * FLOAT  # b still holds the storage
        del b
        assert live.now == 0
        c = torch.zeros(30)
        c.resize_(50)
        assert live.now == 50 * FLOAT
    assert live.peak == 100 * FLOAT
    with live:
        indices, values = torch.zeros(2, 6, dtype=torch.int64), torch.ones(6)
        kept = torch.sparse_coo_tensor(indices, values, (9, 9), check_invariants=False)
        del indices, values
        assert live.now >= 50 * FLOAT + 6 * (2 * 8 + FLOAT)
    assert kept.shape == (9, 9)
    live = LiveTensors(block=512)  # sizes are rounded up to the blocks of an allocator
    with live:
        a, b = torch.zeros(1), torch.zeros(129)
        assert live.now == 512 + 1024
        del a, b
    assert live.now == 0 and live.peak == 512 + 1024


def test_a_storage_belongs_to_the_module_that_made_it_or_was_named():
    live = LiveTensors(running=lambda: "maker")
    W = torch.zeros(3)
    live.count([W], "weights", module="owner")
    with live:
        y = W + 1
        live.count([y], "gradients")
    assert live.at_peak().parts == {("weights", "owner"): 3 * FLOAT, ("gradients", "maker"): 3 * FLOAT}


# ---- a training step


def test_categories_of_a_lora_step():
    model = adapted()
    report = step_memory(model)
    parts = report["breakdown"]
    assert tuple(parts) == CATEGORIES
    assert sum(parts.values()) == report["train_peak"]
    base = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    assert parts["weights"] == size(base)
    assert parts["adapters"] == size(trainable(model))
    # Two moments of the size of the parameter and a step counter each.
    assert parts["optimizer"] == 2 * size(trainable(model)) + FLOAT * len(trainable(model))
    assert parts["other"] == 3 * B * T * 8  # the batch: three int64 tensors
    assert report["kind"] == "live_tensors"
    assert report["peak_phase"] == "backward"


def test_saved_activations_grow_with_the_rank_by_one_narrow_product_per_layer():
    """B's gradient needs x A^T, n x r; all else that LoRA saves does not depend on r (methods: one float32
    each)."""
    saved = {r: step_memory(adapted(lora(r)))["saved_for_backward"] for r in (4, 8)}
    layers = 2 * 4  # decoder blocks x targets
    assert saved[8] - saved[4] == layers * B * T * (8 - 4) * FLOAT


def test_gradients_are_alive_when_the_optimizer_steps_and_with_accumulation_in_a_forward_pass():
    model = adapted(FullMethod("full"))
    few_tokens = {k: v[:1, :2] for k, v in batch().items()}
    report = training_cost(model, few_tokens, recipe(), FullMethod("full"))["memory"]
    assert report["peak_phase"] == "optimizer"  # with two tokens activations are nothing
    assert report["breakdown"]["gradients"] == size(model.parameters())
    assert report["breakdown"]["adapters"] == 0
    once, twice, often = (step_memory(adapted(), gradient_accumulation=n) for n in (1, 2, 7))
    assert once["breakdown"]["gradients"] < size(trainable(adapted())) == twice["breakdown"]["gradients"]
    assert once["train_peak"] < twice["train_peak"] == often["train_peak"]


def test_activation_checkpointing_saves_less_and_its_recomputation_is_counted():
    plain = step_memory(adapted())
    saving = step_memory(adapted(), activation_checkpointing=True)
    assert saving["saved_for_backward"] < plain["saved_for_backward"] / 2
    assert saving["breakdown"]["activations"] <= saving["saved_for_backward"]
    assert saving["breakdown"]["transients"] > plain["breakdown"]["transients"]
    assert saving["train_peak"] < plain["train_peak"]


def test_a_penalty_is_part_of_the_step_and_a_forward_pass_has_no_gradients():
    def penalty(model):
        return sum((p.flatten().repeat(9) ** 2).sum() for p in trainable(model))

    method = lora(dropout=0.2)
    model = adapted(method)
    step = step_memory(model, method)
    assert step == step_memory(model, method)  # the same again
    method.penalty = penalty
    assert step_memory(model, method)["saved_for_backward"] > step["saved_for_backward"]
    at_least = size(model.parameters()) + size(model.buffers()) + 2 * B * T * 8 + B * T * V * FLOAT
    assert at_least < forward_memory(model, batch()) < step["train_peak"]


def test_the_separate_step_has_the_peak_of_a_step_of_the_training(tmp_path):
    """The Trainer's own step, watched from outside, has the same peak but for a few scalars that it keeps."""
    live = LiveTensors()

    class Watch(Meter):
        def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
            super().on_step_begin()
            if state.global_step == 1:
                live.count(model.parameters(), "weights")
                live.count(model.buffers(), "weights")
                live.count([t for s in optimizer.state.values() for t in s.values()], "optimizer")
                live.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                live.__exit__(None, None, None)
            super().on_step_end()

    for precision in ("float32", "bf16_mixed"):
        live = LiveTensors()
        cfg = recipe(precision=precision)
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        model = adapt(lora(), make_tiny_llama().to(dtype), precision=precision)
        expected = training_cost(model, batch(), cfg, lora())["memory"]["train_peak"]
        train(model, random_data(V, cfg, 0), collator(None, "fixed", T), cfg, lora(), Watch(0), tmp_path / precision, 0)
        assert abs(live.peak - expected) <= 64, precision


def test_measuring_leaves_no_trace():
    model = adapted(lora(dropout=0.2))
    model.eval()
    model.get_submodule("base_model.model.lm_head").train()
    model(**{k: batch()[k] for k in ("input_ids", "labels")}).loss.backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: (p.grad, p.grad if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    versions = [buffer._version for buffer in model.buffers()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

    step_memory(model, gradient_accumulation=2)
    forward_memory(model, batch())
    count_inference_flops(model, batch())

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        same, gradient = gradients[name]
        assert parameter.grad is same
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert versions == [buffer._version for buffer in model.buffers()]  # what nobody wrote to is not written to
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


# ---- FLOPs


def test_flops_of_a_step_of_the_whole_model():
    model = make_tiny_llama()
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    heads, width, layers = 4, 8, 2
    matrix = 3 * 2 * B * T * linears  # forward, input gradient, weight gradient
    attention = (2 + 5) * 2 * B * heads * T * T * width * layers  # backward computes the scores again
    angles = 2 * T * width // 2  # of the rotary embedding, a matrix product in older transformers
    assert step_flops(model) - matrix - attention in (0, angles)
    assert step_flops(model, gradient_accumulation=3) == 3 * step_flops(model)


def test_recomputation_costs_one_more_forward_of_the_blocks():
    model = make_tiny_llama()
    plain = step_flops(model)
    enable_activation_checkpointing(model)
    blocks = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    # The recomputation stops once everything that was saved is there again, before the last product of a
    # block.
    last = sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
    attention = 2 * 2 * B * 4 * T * T * 8 * 2
    assert step_flops(model) - plain == 2 * B * T * (blocks - last) + attention
