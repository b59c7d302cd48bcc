"""The forward product on 2:4 tensor cores: which product is chosen, here with a stand-in for the kernels; their numbers
on a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from lors import LorsConfig
from lors.functional import masked_linear
from lors.kernels import in_use, product, sparse_product, usage
from lors.sparsity import follows_pattern, lowest_per_group

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def problem(height: int = 128, width: int = 64, rows: int = 5) -> dict[str, Tensor]:
    """A 2:4 weight, its factors and an input."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (3, rows, width), "weight": (height, width), "A": (4, width), "B": (height, 4)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["weight"][lowest_per_group(drawn["weight"].abs(), "2:4")] = 0.0
    return drawn


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The sparse kernels run on every device and compute a dense product; the weights they were given."""
    weights: list[Tensor] = []

    def sparse(X: Tensor, T: Tensor, bias: Tensor | None) -> Tensor:
        weights.append(T)
        return linear(X, T, bias)

    monkeypatch.setattr(sparse_product, "_sparse", sparse)
    monkeypatch.setattr(sparse_product, "runs", lambda T: True)
    monkeypatch.setattr(sparse_product, "_faster", {})
    monkeypatch.setitem(usage._ran, "product", set())
    return weights


@pytest.fixture
def scripted_times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Milliseconds that the next measurements take, the sparse product before the dense one."""
    script: list[float] = []
    monkeypatch.setattr(sparse_product, "milliseconds", lambda device, *calls: [script.pop(0) for _ in calls])
    return script


def gradients(kind: str, bias: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of ``masked_linear`` with one of the products."""
    given = {name: tensor.requires_grad_(name != "weight") for name, tensor in problem().items()}
    output = masked_linear(**given, scaling=0.5, bias=bias, forward_product=kind)
    return [output, *torch.autograd.grad(output.square().sum(), [given[name] for name in ("x", "A", "B")])]


def test_the_sparse_product_gets_the_merged_weight_and_changes_no_number(stand_in) -> None:
    bias = torch.linspace(-1, 1, 128)
    torch.testing.assert_close(gradients("2:4", bias), gradients("dense", bias), rtol=0, atol=0)
    (T,) = stand_in  # once: the backward pass is dense
    assert in_use()["product"] == ["2:4"]  # a product that is plain anyway is not told
    assert follows_pattern(T, "2:4") and not torch.equal(T, problem()["weight"])


def test_the_faster_product_is_chosen_once_for_each_shape(stand_in, scripted_times, monkeypatch) -> None:
    weight = problem()["weight"]

    def multiply(rows: int, T: Tensor = weight) -> int:
        """Calls of the sparse kernels so far."""
        torch.testing.assert_close(product(torch.ones(rows, T.shape[1]), T, None, "auto"), T.sum(1).expand(rows, -1))
        return len(stand_in)

    scripted_times += [1.0, 2.0]
    monkeypatch.setattr(sparse_product, "capturing", lambda device: True)
    assert multiply(5) == 0 and len(scripted_times) == 2  # nothing is measured while a graph is captured
    assert in_use()["product"] == ["dense"]
    monkeypatch.setattr(sparse_product, "capturing", lambda device: False)
    assert [multiply(rows) for rows in (5, 8, 6)] == [1, 2, 3]  # one measurement for 5 to 8 rows
    assert in_use()["product"] == ["2:4", "dense"]
    scripted_times += [2.0, 1.0]
    assert [multiply(rows) for rows in (9, 16)] == [3, 3]
    scripted_times += [2.0, 2.0]  # a tie stays dense
    assert multiply(5, weight[:64]) == 3
    assert not scripted_times


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_kernels_that_fail_are_not_faster(kind, stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device, *calls: object) -> list[float]:
        raise kind("not supported on this architecture\nin three places")

    monkeypatch.setattr(sparse_product, "milliseconds", fail)
    x, T = problem()["x"], problem()["weight"]
    with pytest.warns(UserWarning, match=r"no 2:4 product for \(128, 64\), .* \(not supported on this architecture\)$"):
        assert torch.equal(product(x, T, None, "auto"), linear(x, T))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(product(x, T, None, "auto"), linear(x, T))
    assert not stand_in
    assert in_use()["notices"][-1].startswith("no 2:4 product for (128, 64), the dense one is taken (not supported")


def test_one_operator_with_the_flops_of_the_dense_product(stand_in) -> None:
    x, T = problem()["x"], problem()["weight"]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lors.linear_2_4.default, (x, T, None, True), test_utils=checks)
    stand_in.clear()
    with FlopCounterMode(display=False) as counter:
        product(x, T, None, "2:4")
        assert product(x[:0], T, None, "2:4").shape == (0, 5, 128)
    assert counter.get_total_flops() == 2 * 15 * 64 * 128
    assert len(stand_in) == 1  # an empty input needs no kernel


def test_the_kernels_get_rows_and_give_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuSPARSELt reads what it is given, and as torch 2.11 gives what it has made."""

    def kernels(X: Tensor, T: Tensor, bias: Tensor | None) -> Tensor:
        memory = X.as_strided(X.shape, (X.shape[1], 1))
        return linear(memory, T, bias).t().contiguous().t()

    monkeypatch.setattr(sparse_product, "linear", kernels)
    monkeypatch.setattr(sparse_product, "to_sparse_semi_structured", lambda T: T)
    monkeypatch.setattr(sparse_product, "runs", lambda T: True)
    T, x = problem()["weight"], problem(width=96)["x"][0]
    for part in (x[:, 16:80], x[:1, 16:80].expand(5, -1), x[:, :64].t().contiguous().t()):
        y = product(part, T, None, "2:4")
        torch.testing.assert_close(y, linear(part, T))
        assert y.is_contiguous()


def test_without_the_kernels_auto_is_dense_and_the_pattern_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, T = problem()["x"], problem()["weight"]
    monkeypatch.setitem(usage._ran, "product", set())
    assert torch.equal(product(x, T, None, "auto"), linear(x, T))
    assert in_use()["product"] == ["dense"]
    with pytest.raises(ValueError, match=r"forward_product='2:4': needs a CUDA device .* this is cpu, torch.float32"):
        product(x, T, None, "2:4")


# The adapter


def small_model(*patterns: str) -> nn.Module:
    """One linear for each pattern."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64, bias=False) for _ in patterns]
    for layer, pattern in zip(layers, patterns, strict=True):
        score = layer.weight.detach().abs()
        layer.weight.data[lowest_per_group(score, pattern)] = 0.0
    return nn.Sequential(*layers)


def adapter(**fields: object) -> LorsConfig:
    return LorsConfig(r=2, target_modules=["0", "1"], **fields)


def test_auto_is_for_layers_that_are_2_4_dense_or_compressed(stand_in, scripted_times) -> None:
    scripted_times += [1.0, 2.0]
    for storage in ("dense", "auto"):
        stand_in.clear()
        model = get_peft_model(small_model("2:4", "4:8"), adapter(forward_product="auto", storage=storage))
        expected = small_model("2:4", "4:8")(torch.eye(64))
        torch.testing.assert_close(model(torch.eye(64)), expected)
        assert len(stand_in) == 1 and torch.equal(stand_in[0], small_model("2:4", "4:8")[0].weight)


def test_the_first_active_adapter_decides(stand_in) -> None:
    model = get_peft_model(small_model("2:4", "2:4"), adapter())
    model.add_adapter("sparse", adapter(forward_product="2:4"))
    model(torch.eye(64))
    assert not stand_in
    model.set_adapter("sparse")
    model(torch.eye(64))
    assert len(stand_in) == 2


def test_a_weight_of_another_pattern_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"target_modules: '1': forward_product='2:4': the weight does not follow 2:4"):
        get_peft_model(small_model("2:4", "4:8"), adapter(forward_product="2:4"))
    with pytest.raises(ValueError, match="forward_product='sparse': must be one of dense, 2:4, auto"):
        adapter(forward_product="sparse")
    model = get_peft_model(small_model("4:8", "4:8"), adapter())
    with pytest.raises(ValueError, match="does not follow 2:4"):
        model.add_adapter("sparse", adapter(forward_product="2:4"))


# On a GPU


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 256])
def test_the_kernels_round_as_a_dense_product_does(rows: int, dtype: torch.dtype) -> None:
    given = {name: tensor.to("cuda", dtype) for name, tensor in problem(256, 192, rows).items()}
    for bias in (None, torch.linspace(-1, 1, 256, device="cuda", dtype=dtype)):
        outputs = [masked_linear(**given, scaling=0.5, bias=bias, forward_product=kind) for kind in ("2:4", "dense")]
        torch.testing.assert_close(*outputs, rtol=2 * torch.finfo(dtype).eps, atol=0.05)


@GPU
@pytest.mark.gpu
def test_auto_measures_on_the_gpu() -> None:
    given = {name: tensor.to("cuda", torch.bfloat16) for name, tensor in problem(4096, 4096, 700).items()}
    sparse_product._faster.clear()
    outputs = [masked_linear(**given, scaling=0.5, forward_product=kind) for kind in ("auto", "dense")]
    torch.testing.assert_close(*outputs, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0.5)
    assert list(sparse_product._faster) == [(given["x"].device, torch.bfloat16, 4096, 4096, 4096)]
