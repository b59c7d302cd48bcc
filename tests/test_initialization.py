"""lors.initialize: the right subspace, nothing left behind, and clear errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from pruned_models import adapted_model, logits, lors_layers, pruned_model, weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lors

Batch = dict[str, Tensor]


def make_batches(sizes: tuple[tuple[int, int], ...] = ((3, 12), (1, 7)), seed: int = 0) -> list[Batch]:
    """One batch for each (rows, length); the last third of every row has no loss."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows, length in sizes:
        ids = torch.randint(0, 64, (rows, length), generator=generator)
        labels = ids.clone()
        labels[:, -(length // 3) :] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def fresh_model(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    return get_peft_model(pruned_model(dtype), lors.LorsConfig(**({"r": 4} | options)))


def reference_gradients(batches: list[Batch]) -> dict[str, Tensor]:
    """Gradient of the sum over all label tokens, for every decoder weight of the plain pruned model."""
    model = pruned_model()
    for batch in batches:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        predicted, labels = output[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        cross_entropy(predicted, labels, reduction="sum", ignore_index=-100).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if name.endswith("proj.weight")}


def factors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """A of every layer, by the name of the weight that it adapts."""
    return {
        f"{layer.removeprefix('base_model.model.')}.weight": part.lors_A[name].detach().clone()
        for layer, part in lors_layers(model).items()
    }


def overlap(one: Tensor, other: Tensor) -> float:
    """1 if the rows of two orthonormal matrices span the same space, r / in for two random ones."""
    return float((one.float() @ other.float().t()).square().sum()) / len(one)


def same_spaces(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> bool:
    return one.keys() == other.keys() and all(overlap(one[name], other[name]) > 1 - tolerance for name in one)


@pytest.mark.parametrize("r", [1, 4, 16], ids=lambda r: f"r={r}")
def test_rows_are_the_top_right_singular_vectors_of_the_token_weighted_gradient(r: int) -> None:
    """A wide projection makes the SVD exact. For k_proj, 32 -> 16, the last rank is the full one."""
    batches = make_batches()
    model = fresh_model(r=r)
    before = logits(model)
    assert lors.initialize(model, batches, oversampling=40) is model
    expected = reference_gradients(batches)
    for name, A in factors(model).items():
        top = torch.linalg.svd(expected[name].double(), full_matrices=False).Vh[:r]
        assert overlap(A, top) > 1 - 1e-5, name
        torch.testing.assert_close(A @ A.t(), torch.eye(r), rtol=0, atol=1e-5)
    assert torch.equal(logits(model), before)


def test_batches_count_by_their_label_tokens() -> None:
    """Rows apart or together are the same data; the order of batches does not matter either."""
    (batch,) = make_batches(((4, 10),))
    batch["labels"][0, :5] = -100
    batch["labels"][1] = -100
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(4)]
    together = factors(lors.initialize(fresh_model(), [batch]))
    assert same_spaces(factors(lors.initialize(fresh_model(), rows)), together)
    assert same_spaces(factors(lors.initialize(fresh_model(), iter(rows[::-1]))), together)
    assert not same_spaces(factors(lors.initialize(fresh_model(), rows[2:])), together)


# Nothing is left behind


def state(model: nn.Module) -> list:
    """All that initialisation must not change, except A and B."""
    modules, parameters, layers = list(model.modules()), list(model.parameters()), lors_layers(model).values()
    return [
        [(id(p), p.requires_grad, p.grad, p.device, len(p._post_accumulate_grad_hooks or {})) for p in parameters],
        [module.training for module in modules],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules],
        [(layer.disable_adapters, layer.active_adapters) for layer in layers],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_state_of_model_and_generator_is_restored(fails: bool) -> None:
    model = fresh_model(modules_to_save=["lm_head"])
    model.train()
    model.base_model.model.model.layers[1].eval()
    if fails:
        model.base_model.disable_adapter_layers()
    lors_layers(model)["base_model.model.model.layers.0.mlp.up_proj"].lors_A["default"].requires_grad_(False)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    head.grad = torch.ones_like(head)
    before, pruned, trained = state(model), weights(model), head.clone()
    batches = make_batches()
    if fails:
        with pytest.raises(ValueError, match="batch 2 has no 'labels', only"):
            lors.initialize(model, [*batches, {"input_ids": batches[0]["input_ids"]}])
    else:
        lors.initialize(model, batches)
    assert state(model) == before
    assert all(torch.equal(weight, pruned[name]) for name, weight in weights(model).items())
    assert torch.equal(head, trained) and torch.equal(head.grad, torch.ones_like(head))


def test_one_weight_gradient_is_alive_at_a_time_and_only_those_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model(target_modules=["v_proj", "down_proj"])
    register = Tensor.register_post_accumulate_grad_hook
    alive: list[tuple[int, int]] = []
    differentiable: set[str] = set()

    def gradients() -> int:
        return sum(parameter.grad is not None for parameter in model.parameters())

    def watch(parameter: Tensor, hook: Callable) -> object:
        def watched(weight: Tensor) -> None:
            differentiable.update(name for name, p in model.named_parameters() if p.requires_grad)
            during = gradients()
            hook(weight)
            alive.append((during, gradients()))

        return register(parameter, watched)

    monkeypatch.setattr(Tensor, "register_post_accumulate_grad_hook", watch)
    lors.initialize(model, make_batches())
    assert alive == [(1, 0)] * 8  # 4 layers, 2 batches
    assert differentiable == {f"{name}.base_layer.weight" for name in lors_layers(model)}


def test_same_seed_same_bits_also_with_dropout() -> None:
    def run(seed: int, noise: int) -> dict[str, Tensor]:
        model = fresh_model()
        for layer in model.base_model.model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(noise)
        return factors(lors.initialize(model, make_batches(), seed=seed))

    first, second, other = run(0, noise=1), run(0, noise=2), run(1, noise=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not same_spaces(first, other)  # other dropout


def test_second_call_gives_the_same_and_forgets_training() -> None:
    """The gradient is that of the pruned model, whatever the adapters have learnt."""
    expected = factors(lors.initialize(fresh_model(), make_batches()))
    injected = inject_adapter_in_model(lors.LorsConfig(r=4), pruned_model())  # without a PeftModel
    assert same_spaces(factors(lors.initialize(injected, make_batches())), expected)
    model = adapted_model()
    model.add_adapter("other", lors.LorsConfig(r=4))
    for name in ("default", "other"):
        lors.initialize(model, make_batches(), adapter_name=name)
        assert all(torch.equal(A, expected[key]) for key, A in factors(model, name).items())
        assert not any(layer.lors_B[name].any() for layer in lors_layers(model).values())


# Settings of the model


def test_bf16_model_sums_in_float32() -> None:
    """Sixty small batches: a bf16 sum would lose most of the later ones."""
    batches = make_batches(((1, 6),) * 60)
    model = lors.initialize(fresh_model(torch.bfloat16), batches)
    plain = pruned_model(torch.bfloat16)
    sums = {name: torch.zeros(p.shape) for name, p in plain.named_parameters() if name.endswith("proj.weight")}
    for batch in batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        for name, total in sums.items():
            total += plain.get_parameter(name).grad.float()
    for name, A in factors(model).items():
        assert A.dtype is torch.float32
        assert overlap(A, torch.linalg.svd(sums[name]).Vh[:4]) > 0.9999, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    expected = factors(lors.initialize(fresh_model(), make_batches()))
    model = fresh_model()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="None of the inputs have requires_grad")
        lors.initialize(model, make_batches())
    assert same_spaces(factors(model), expected)


def test_layer_without_a_gradient_keeps_its_factor() -> None:
    """Where down_proj is zero nothing flows back to up_proj and gate_proj of that block."""
    model = fresh_model()
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.weight.zero_()
    before = factors(model)
    with pytest.warns(
        UserWarning, match=r"2 of 14 layers had no gradient and keep their A: .*\.0\.mlp\.(gate|up)_proj"
    ):
        lors.initialize(model, make_batches())
    kept = [name for name, A in factors(model).items() if torch.equal(A, before[name])]
    assert sorted(kept) == ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]


# Errors


def test_wrong_batches_and_adapters_are_refused() -> None:
    merged, broken = adapted_model(), fresh_model()
    merged.merge_adapter()
    broken.base_model.model.lm_head.weight.data[3] = float("nan")
    for model, options, message in (
        (fresh_model(), {"batches": iter(())}, "batches: no batch has a label"),
        (fresh_model(), {"batches": make_batches(((2, 1),))}, "batches: no batch has a label"),
        (broken, {}, "the loss of batch 0 is nan"),
        (fresh_model(), {"adapter_name": "style"}, r"adapter_name='style': .* it has \['default'\]"),
        (pruned_model(), {}, "adapter_name='default': .* it has none"),
        (fresh_model(init="kaiming"), {}, "init='kaiming': the config of 'default'"),
        (fresh_model(), {"oversampling": 0}, "oversampling=0: must be at least 1"),
        (fresh_model(), {"power_iterations": -1}, "power_iterations=-1: must be at least 0"),
        (merged, {}, "merged adapter: unmerge it first"),
    ):
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            lors.initialize(model, **({"batches": make_batches()} | options))
        assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.to("meta"), "offloaded or on the meta device"),
        (lambda layer: setattr(layer.weight, "data", torch.empty(0)), r"sharded \(FSDP1, ZeRO-3\)"),
    ],
    ids=["meta", "sharded"],
)
def test_a_weight_that_is_not_whole_is_refused_before_anything_changes(change: Callable, message: str) -> None:
    """FSDP2 is in test_distributed."""
    model = fresh_model()
    name, layer = list(lors_layers(model).items())[3]
    change(layer.base_layer)
    before = factors(model)
    with pytest.raises(ValueError, match=rf"the weight of {name} is {message}: call lors.initialize before that"):
        lors.initialize(model, make_batches())
    assert all(torch.equal(A, before[name]) for name, A in factors(model).items())
