"""Step times: what is dropped, what is reported, which span a delay is charged to; peaks of the process and
of CUDA."""

import mmap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from callback_loop import with_callbacks
from conftest import make_tiny_llama, make_tokenizer, recipe
from peft import LoraConfig
from transformers import TrainerCallback

from harness.data import collator, random_data
from harness.meter import CudaPeak, Meter, Phases, parts_of_peak, process_rss_peak
from harness.method import Method, adapt
from harness.train import train

DELAY = 10  # seconds; far above a step of the small model, also on a busy machine
STEPS, WARMUP = 8, 3
RECIPE = recipe(steps=STEPS, sequence_length=8, warmup_steps=0, checkpoint_every=None)


class Clock:
    """The clock of the machine, put forward by whoever sleeps."""

    def __init__(self):
        self.slept = 0.0

    def perf_counter(self):
        return time.perf_counter() + self.slept

    def sleep(self, seconds):
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("harness.meter.time", clock)
    return clock


class Sleep(TrainerCallback):
    """Sleeps at the beginning of the steps of these numbers, from 1, inside the span that is being timed."""

    def __init__(self, clock, *steps):
        self.clock = clock
        self.steps = steps

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 in self.steps:
            self.clock.sleep(DELAY)


def run(tmp_path: Path, *callbacks, model=None, warmup=WARMUP, data=None, tokenizer=None) -> Meter:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    method = with_callbacks(Method(name="lora", peft=config), *callbacks)
    meter = Meter(warmup)
    model = model or adapt(method, make_tiny_llama())
    data = data or random_data(64, RECIPE, 0)
    train(model, data, collator(tokenizer, "longest", 8), RECIPE, method, meter, tmp_path, seed=0)
    return meter


def test_a_delay_in_a_warm_up_step_does_not_change_the_report(tmp_path, clock):
    meter = run(tmp_path, Sleep(clock, 1, 2, 3))
    report = meter.time_report()
    assert [step.warmup for step in meter.steps] == [True] * 3 + [False] * 5
    assert (report["warmup_steps"], report["steps"]) == (3, 5)
    assert all(step.ms > DELAY * 1e3 for step in meter.steps[:3])
    assert report["step_ms"]["p90"] < DELAY * 1e3
    assert report["tokens_per_second"] > 5 * 32 / (5 * DELAY)


def test_a_delay_in_a_later_step_changes_the_report(tmp_path, clock):
    report = run(tmp_path, Sleep(clock, 4, 6, 7)).time_report()
    assert report["step_ms"]["p10"] < DELAY * 1e3 < report["step_ms"]["p50"]
    assert report["tokens_per_second"] < 5 * 32 / (3 * DELAY)


def test_spans_are_charged_where_the_time_goes(tmp_path, clock):
    def delays():
        model = adapt(
            Method(name="lora", peft=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")),
            make_tiny_llama(),
        )
        parameter = next(p for p in model.parameters() if p.requires_grad)
        yield "forward", model, lambda: model.register_forward_hook(lambda *_: clock.sleep(DELAY / 4))
        yield "backward", model, lambda: parameter.register_hook(lambda _: clock.sleep(DELAY / 4))

    class SlowOptimizer(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            clock.sleep(DELAY / 2)

    for span, model, delay in delays():
        handle = delay()
        report = run(tmp_path / span, model=model).time_report()
        handle.remove()
        # Two micro-batches, each with a quarter of the delay.
        spans = {name: report[f"{name}_ms"] for name in ("forward", "backward", "optimizer")}
        assert spans.pop(span) >= DELAY / 2 * 1e3
        assert max(spans.values()) < DELAY / 2 * 1e3
    report = run(tmp_path / "optimizer", SlowOptimizer()).time_report()
    assert report["optimizer_ms"] >= DELAY / 2 * 1e3 > max(report["forward_ms"], report["backward_ms"])


def test_spans_add_up_to_the_step(tmp_path):
    for step in run(tmp_path).steps:
        assert min(step.forward_ms, step.backward_ms, step.optimizer_ms) > 0
        # What is left is the hand-over between micro-batches.
        assert 0.7 * step.ms < step.forward_ms + step.backward_ms + step.optimizer_ms <= step.ms


def test_padding_is_no_token(tmp_path):
    rows = [{"input_ids": [1] * (2 + i % 5), "labels": [1] * (2 + i % 5)} for i in range(32)]
    meter = run(tmp_path, data=rows, tokenizer=make_tokenizer())
    assert sum(step.tokens for step in meter.steps) == sum(len(row["input_ids"]) for row in rows)


def test_a_step_is_always_left_to_report(tmp_path):
    report = run(tmp_path, warmup=100).time_report()
    assert (report["warmup_steps"], report["steps"]) == (STEPS - 1, 1)


def test_a_resumed_run_reports_the_steps_of_all_its_processes():
    meter = Meter(warmup_steps=1)
    state = SimpleNamespace(max_steps=5, global_step=3)
    lines = [{"ms": 10.0 * i, "forward_ms": 4.0, "backward_ms": 5.0, "optimizer_ms": 1.0, "tokens": 20,
              "warmup": i == 1} for i in (1, 2, 3)]  # fmt: skip
    meter.load_state_dict({"steps": lines, "peak": {}})
    meter.on_train_begin(SimpleNamespace(device=torch.device("cpu")), state, None)
    for _ in range(2):
        meter.on_step_begin()
        meter.mark("")
        meter.count_tokens(torch.ones(4, 5))
        meter.mark("forward")
        meter.mark("backward")
        meter.on_step_end()
    assert [step.warmup for step in meter.steps] == [True, False, False, True, False]
    report = meter.time_report()
    assert (report["warmup_steps"], report["steps"]) == (2, 3)
    assert report["step_ms"]["p50"] == 20.0  # of 20, 30 and the short step of this process


def test_the_peak_is_that_of_all_processes_of_a_run(monkeypatch):
    allocated, reserved = [70, 30], [80, 90]  # of the first process, and of one that only loads a checkpoint
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: allocated[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: reserved[0])
    first, second = Meter(), Meter()
    first._device = second._device = torch.device("cuda")
    state = first.state_dict()
    allocated.pop(0), reserved.pop(0)
    second.load_state_dict(state)
    assert second.peak() == CudaPeak(70, 90)
    assert Meter().peak() == CudaPeak()


def test_a_breakdown_never_contradicts_its_peak() -> None:
    parts = {"weights": 60, "activations": 30}
    assert parts_of_peak(parts, 100) == {"weights": 60, "activations": 30, "allocator": 10}
    assert parts_of_peak(parts, 80) is None, "full rows were counted, and the training had none"
    assert parts_of_peak(None, 80) is None


def test_percentiles_and_rates():
    meter = Meter()
    lines = [{"ms": float(ms), "forward_ms": 1.0, "backward_ms": 2.0, "optimizer_ms": 3.0, "tokens": 7,
              "warmup": False} for ms in range(1, 12)]  # fmt: skip
    meter.load_state_dict({"steps": lines, "peak": {}})
    report = meter.time_report()
    assert report["step_ms"] == {"p10": 2.0, "p50": 6.0, "p90": 10.0}
    assert (report["forward_ms"], report["backward_ms"], report["optimizer_ms"]) == (1.0, 2.0, 3.0)
    assert report["tokens_per_second"] == pytest.approx(11 * 7 / 0.066)


def test_nothing_measured_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="no step to report: 0 measured"):
        Meter().time_report()


def test_process_peak_covers_a_block_that_is_gone_again():
    resident = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
    size = 64 * 2**20
    block = mmap.mmap(-1, size)  # fresh pages; an allocator might hand out some that are resident already
    for page in range(0, size, mmap.PAGESIZE):
        block[page] = 1
    block.close()
    assert process_rss_peak() >= resident + 0.9 * size


def test_a_cpu_has_no_allocator_peak():
    with Phases(torch.device("cpu"))("load") as peak:
        torch.zeros(1000)
    assert (peak.allocated, peak.reserved) == (None, None)


def test_memory_that_an_earlier_phase_has_left_in_the_cache_is_not_reserved_by_the_next(monkeypatch) -> None:
    """As the allocator of CUDA counts: what is freed stays reserved until it is given back."""
    reserved = {"now": 0, "peak": 0}
    stand_ins = {
        "synchronize": lambda _: None,
        "empty_cache": lambda: reserved.update(now=0),
        "reset_peak_memory_stats": lambda _: reserved.update(peak=reserved["now"]),
        "max_memory_allocated": lambda _: 0,
        "max_memory_reserved": lambda _: reserved["peak"],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    phase = Phases(torch.device("cuda"))
    with phase("init"):
        reserved.update(now=80, peak=80)
    with phase("train") as peak:
        reserved.update(now=30, peak=max(30, reserved["peak"]))
    assert peak.reserved == 30


@pytest.mark.gpu
def test_cuda_peaks_are_reset_between_phases():
    device = torch.device("cuda", 0)
    phase = Phases(device)
    with phase("load") as first:
        torch.zeros(2**26, device=device)
    with phase("train") as second:
        torch.zeros(2**20, device=device)
    assert first.allocated >= 2**28 > second.allocated >= 2**22


@pytest.mark.gpu
def test_cuda_spans_are_device_time(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = adapt(Method(name="lora", peft=config), make_tiny_llama().cuda())
    for step in run(tmp_path, model=model).steps:
        assert 0 < step.forward_ms + step.backward_ms + step.optimizer_ms <= 1.05 * step.ms
