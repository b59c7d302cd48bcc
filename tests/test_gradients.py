"""The sampled gradients of ``lors.gradients``: unbiased, and nearer to the exact ones than straight-through."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from contract import ROWS, batch, pruned
from peft import get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer, TrainingArguments

import lors
from lors.gradients import factor_gradients, sample_tokens
from lors.kernels import BITMAP, DENSE, PackedWeight, pack
from lors.schedule import GradientSchedule

OUT, IN, R, SCALE = 12, 10, 3, 1.7
N = 16


@cache
def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """G, X, W, A, B; a few tokens carry most, some nothing, and the rows of W differ in density."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    G, X = draw(N, OUT) * draw(N, 1).exp(), draw(N, IN)
    G[3], X[5] = 0, 0
    W = draw(OUT, IN) * (torch.empty(OUT, IN).uniform_(generator=generator) < torch.linspace(0.2, 0.8, OUT)[:, None])
    return tuple(tensor.to(dtype) for tensor in (G, X, W, draw(R, IN), draw(OUT, R)))


def dense(W: Tensor) -> PackedWeight:
    return PackedWeight(DENSE, (W,), tuple(W.shape))


def at_places(monkeypatch: pytest.MonkeyPatch, places: int, compute: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What is computed with so many values of the one number that is drawn, at equal distances."""
    found = []
    for number in range(places):
        monkeypatch.setattr(torch, "rand", lambda *_, number=number, **__: torch.tensor((number + 0.5) / places))
        found.append(compute())
    monkeypatch.undo()
    return found


def sampled(share: float, seed: int = 0) -> list[Tensor]:
    G, X, W, A, B = problem(seed)
    return list(factor_gradients(G, X, dense(W), A, B, SCALE, share))


def without_control_variate(share: float, seed: int) -> list[Tensor]:
    G, X, W, A, B = problem(seed)
    index, c = sample_tokens(G, X, share)
    D = ((c[:, None] * G[index]).t() @ X[index]) * (W != 0)
    return [SCALE * B.t() @ D, SCALE * D @ A.t()]


def exact(seed: int = 0) -> list[Tensor]:
    G, X, W, A, B = problem(seed)
    P = (G.t() @ X) * (W != 0)
    return [SCALE * B.t() @ P, SCALE * P @ A.t()]


@pytest.mark.parametrize("share", [0.125, 0.6])
def test_the_mean_over_the_draw_is_the_exact_gradient(monkeypatch, share: float) -> None:
    """All draws follow from one number: its mean over a grid of 1,024 places is the expectation up to the grid."""
    found = at_places(monkeypatch, 1024, lambda: sampled(share))
    for part, wanted in zip(zip(*found, strict=True), exact(), strict=True):
        spread = torch.stack(part).std(0).norm()
        assert spread > 0.05 * wanted.norm()
        assert (torch.stack(part).mean(0) - wanted).norm() < 0.01 * spread


def test_no_more_than_the_share_of_the_tokens_is_taken_and_none_that_counts_nothing() -> None:
    G, X, *_ = problem()
    for share, m in ((0.01, 2), (0.25, 4), (0.5, 8), (1, N)):
        index, c = sample_tokens(G, X, share)
        assert index.shape == c.shape == (m,)
        of_token = torch.zeros_like(G[:, 0]).index_add_(0, index, c)
        if share < 1:
            assert not of_token[[3, 5]].any()
    w = G.norm(dim=1) * X.norm(dim=1)
    index, c = sample_tokens(G, X, 0.5)
    assert index[:4].tolist() == w.topk(4).indices.tolist() and (c[:4] == 1).all()
    assert not set(index[:4].tolist()) & set(index[4:].tolist())
    torch.testing.assert_close((c * w[index]).sum(), w.sum())  # the sum of the w_i without variance


def test_all_tokens_give_the_exact_gradient_and_no_gradient_gives_none() -> None:
    G, X, W, A, B = problem()
    for share in (1, 0.999):
        for found, wanted in zip(factor_gradients(G, X, dense(W), A, B, SCALE, share), exact(), strict=True):
            torch.testing.assert_close(found, wanted)
    for found in factor_gradients(torch.zeros_like(G), X, dense(W), A, B, SCALE, 0.25):
        assert not found.any()


def test_a_quarter_is_nearer_than_straight_through_and_the_control_variate_helps(monkeypatch) -> None:
    def error(found: list[list[Tensor]], wanted: list[Tensor]) -> float:
        squares = [(part - w).square().sum() for parts in found for part, w in zip(parts, wanted, strict=True)]
        return sum(squares).item() / len(found)

    sums = dict.fromkeys(("sampled", "alone", "straight-through"), 0.0)
    for seed in range(8):
        ways = {
            "sampled": partial(sampled, 0.25, seed),
            "straight-through": partial(sampled, 0, seed),
            "alone": partial(without_control_variate, 0.25, seed),
        }
        for name, compute in ways.items():
            sums[name] += error(at_places(monkeypatch, 64, compute), exact(seed))
    assert sums["sampled"] < 0.8 * sums["alone"] and sums["sampled"] < 0.8 * sums["straight-through"]


def test_one_gradient_alone_packed_weights_and_half_precision() -> None:
    G, X, W, A, B = problem()
    torch.manual_seed(0)
    both = factor_gradients(G, X, dense(W), A, B, SCALE, 0.25)
    for needed, wanted in ((True, False), both[0]), ((False, True), both[1]):
        torch.manual_seed(0)
        found = factor_gradients(G, X, pack(W, BITMAP), A, B, SCALE, 0.25, *needed)
        torch.testing.assert_close(found[not needed[0]], wanted)
        assert found[needed[0]] is None
    half = [tensor.bfloat16() for tensor in (G, X, W)]
    torch.manual_seed(0)
    found = factor_gradients(half[0], half[1], dense(half[2]), A.float(), B.float(), SCALE, 0.25)
    assert all(part.dtype == torch.float32 for part in found)


# ---- in a model


def gradients_of(checkpointing: bool = False, **fields: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = get_peft_model(pruned(), lors.LorsConfig(r=4, init="kaiming", **fields))
    for name, parameter in model.named_parameters():
        if "lors_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    model.train()(**batch()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_draws_the_same_tokens() -> None:
    fields = {"gradient": "sampled", "gradient_share": 0.3}
    plain, checkpointed = gradients_of(**fields), gradients_of(True, **fields)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_the_older_name_is_still_accepted() -> None:
    old, new = gradients_of(exact_gradient=True), gradients_of(gradient="exact")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    sampled = gradients_of(gradient="sampled")
    assert not all(torch.equal(sampled[name], new[name]) for name in new)
    with pytest.raises(ValueError, match="exact_gradient=True: must be False with gradient='sampled'"):
        lors.LorsConfig(exact_gradient=True, gradient="sampled")


def test_from_a_share_of_the_training_on_the_gradients_are_straight_through(tmp_path) -> None:
    seen = []
    model = get_peft_model(pruned(), lors.LorsConfig(r=2, init="kaiming", gradient="exact", gradient_until=0.5))
    layer = next(part for part in model.modules() if isinstance(part, lors.LorsLinear))
    layer.register_forward_pre_hook(lambda layer, _: seen.append(layer._product_share("default")))
    arguments = TrainingArguments(tmp_path, max_steps=5, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=ROWS, callbacks=[GradientSchedule()]).train()
    assert seen == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_float16_does_not_overflow_where_few_tokens_carry_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    G = (torch.randn(4096, OUT, generator=generator) * 1e-7).half()
    G[:64] = (torch.randn(64, OUT, generator=generator) * 1e-2).half()
    X = torch.randn(4096, IN, generator=generator).half()
    W, A, B = (tensor.half() for tensor in problem()[2:])
    for _ in range(50):
        assert all(part.isfinite().all() for part in factor_gradients(G, X, dense(W), A.float(), B.float(), 1.0, 0.01))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_waits_for_a_device(dtype: torch.dtype, share: float) -> None:
    """As in test_kernels; on fake tensors, which have no numbers."""
    with FakeTensorMode() as mode:
        G, X, W, A, B = map(mode.from_tensor, problem(dtype=dtype))
        found = factor_gradients(G, X, dense(W), A.float(), B.float(), SCALE, share)
    assert [(gradient.shape, gradient.dtype) for gradient in found] == [
        (A.shape, torch.float32),
        (B.shape, torch.float32),
    ]
