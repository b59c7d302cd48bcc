"""The benchmark: what it builds, how it takes turns, what it counts, what it writes."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import lors.functional
from analysis.__main__ import main as analysis
from harness.bench import __main__ as bench
from harness.bench.cases import MERGES, VARIANTS, Case, Setting, build, shape_of, three_pass_merge
from harness.bench.measure import sample, work_of
from lors.kernels import PackedWeight, merge

WIDTH, TOKENS, R, B = 128, 24, 8, 2  # bfloat16: B bytes
U, V, Z = 2 * TOKENS * WIDTH**2, 2 * R * WIDTH**2, 2 * TOKENS * R * 2 * WIDTH
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(shape_of(WIDTH, 1, 64), TOKENS, R, "bf16", "2:4", 0.5, CPU)


@pytest.fixture(scope="module")
def cases(setting) -> dict[tuple[str, str], Case]:
    made = build(setting, ["merge", "linear", "block", "step"], list(VARIANTS))
    return {(case.level, case.variant): case for case in made}


def test_every_variant_runs_at_every_level(cases) -> None:
    assert len(cases) == 3 * (len(VARIANTS) - 1) + len(MERGES)  # all but lors_2_4, which is for GPUs
    for case in cases.values():
        case.run()
        case.run()


def test_work_of_a_linear_is_that_of_the_cost_table(cases) -> None:
    """As in tests/test_cost_table.py: one product is U, forming a low-rank weight V, a pass through thin factors Z."""
    table = {
        "frozen": 2 * U, "lora": 2 * U + 3 * Z, "spp": 5 * U, "spp_gc": 5 * U, "sqft_gc": 3 * U + 4 * V,
        **dict.fromkeys(MERGES, 2 * U + 2 * V + 2 * Z),
        "lors_exact": 3 * U + 4 * V, "lors_quarter": 2.25 * U + 4 * V + 2 * Z, "lors_eighth": 2.125 * U + 4 * V + 2 * Z,
    }  # fmt: skip
    assert {name: work_of(cases["linear", name]).flops for name in table} == table


def test_bytes_are_those_that_each_operation_reads_and_writes(cases) -> None:
    weight, factors = B * WIDTH**2, B * 2 * R * WIDTH
    mask = WIDTH**2
    # The product reads W and writes T; the comparison writes M; the last pass reads T and M and writes T.
    passes = (weight + factors + weight) + (weight + mask) + (weight + mask + weight)
    assert work_of(cases["merge", "lors_three_pass"]).bytes == passes
    assert work_of(cases["merge", "lors"]).bytes == weight + factors + weight
    packed = weight // 2 + mask // 8  # 2:4 with two bits for each kept weight
    assert work_of(cases["merge", "lors_compressed"]).bytes == packed + factors + weight


def test_a_step_of_a_method_costs_more_than_the_floor(cases) -> None:
    floor = work_of(cases["step", "frozen"]).flops
    assert all(work_of(cases["step", name]).flops > floor for name in ("lora", "lors", "sqft", "spp"))


def test_the_three_passes_are_the_same_weight_and_end_with_their_variant(cases, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    W, A, factor = (torch.randn(*shape, generator=generator) for shape in ((40, 24), (4, 24), (40, 4)))
    W = PackedWeight("dense", (W * (W > 0),), (40, 24))
    expected = merge(W, A, factor, 0.5, torch.float32)
    torch.testing.assert_close(three_pass_merge(W, A, factor, 0.5, torch.float32), expected)
    before = lors.functional.merge
    cases["linear", "lors_three_pass"].run()
    assert lors.functional.merge is before


def test_cases_take_turns_in_another_order_each_round() -> None:
    order: list[str] = []
    cases = [Case("linear", name, lambda name=name: order.append(name)) for name in "abc"]
    sample(cases, CPU, rounds=0, warmup=2)
    assert order[:6] == list("aabbcc")
    slow = [Case("linear", name, lambda name=name: (order.append(name), sum(range(200_000)))) for name in "abc"]
    order.clear()
    seconds = sample(slow, CPU, rounds=6, warmup=1)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 6)
    calls = (len(order) - 6) // 18
    turns = order[6::calls]
    rounds = [turns[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds) and len(set(map(tuple, rounds))) > 1


def test_ratios_are_taken_within_a_round(setting, monkeypatch) -> None:
    """A machine that slows down for everybody changes no ratio."""
    times = {"lora": [1.0, 2.0, 9.0], "frozen": [0.5, 1.0, 4.5], "lors": [1.1, 2.2, 9.9]}
    monkeypatch.setattr(bench, "sample", lambda *_, **__: times)
    cases = [Case("linear", name, lambda: torch.ones(2, 2) @ torch.ones(2, 2)) for name in times]
    table = bench.measure(cases, setting, bench.Roofs(1e9, 1e9), rounds=3, warmup=1).set_index("variant")
    assert table.ms["lora"] == 2000 and table.to_lora["lora"] == 1
    for column in ("to_lora", "to_lora_p10", "to_lora_p90"):
        assert table[column]["lors"] == pytest.approx(1.1) and table[column]["frozen"] == pytest.approx(0.5)
    assert table.to_frozen["lors"] == pytest.approx(2.2) and table.to_lors_three_pass.isna().all()
    assert table.gflops["lora"] == pytest.approx(2 * 2**3 / 2 / 1e9)


def test_the_command_writes_a_tidy_csv_and_a_table(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench, "roofs", lambda *_: bench.Roofs(1e12, 1e10))
    arguments = ["--width", "128", "--tokens", "8", "--rank", "8", "--layers", "1", "--vocabulary", "64"]
    arguments += ["--rounds", "2", "--warmup", "1", "--levels", "merge", "linear", "--output", str(tmp_path / "out")]
    assert bench.main([*arguments, "--variants", "frozen", "lora", "lors_three_pass", "lors"]) == 0
    assert "lors_three_pass" in capsys.readouterr().out
    assert analysis(["bench", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["bench.csv", "bench.md"]
    table = pd.read_csv(tmp_path / "out" / "bench.csv")
    assert list(zip(table.level, table.variant, strict=True)) == [
        ("merge", "lors_three_pass"), ("merge", "lors"),
        *(("linear", name) for name in ("frozen", "lora", "lors_three_pass", "lors")),
    ]  # fmt: skip
    assert {"ms_p10", "to_lora_p90", "gflops", "gbs", "width", "tokens", "rank", "threads", "torch"} <= set(table)
    printed = capsys.readouterr().out
    assert "### merge" in printed and "| LoRS, one pass |" in printed and "of frozen layer" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "100"], "--width 100: must be a multiple of 128"),
        (["--model", "gpt5"], "--model gpt5: must be one of gemma3_270m"),
        (["--tokens", "0"], "--tokens 0: must be a whole number >= 1"),
        (["--pattern", "4:2"], "pattern='4:2': allowed are"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message) -> None:
    assert bench.main([*arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
