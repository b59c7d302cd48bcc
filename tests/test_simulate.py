"""Simulated steps against measured ones, to the byte on a CPU, and the run that makes them."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import make_tiny_llama
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from analysis import simulated
from analysis.results import load
from harness.cards import CARDS, MOST_CARDS, cards_needed
from harness.config import resolve
from harness.data import collator, random_data
from harness.identity import run_key
from harness.live_memory import CATEGORIES, LiveTensors, training_step
from harness.meter import training_cost
from harness.method import PRECISIONS, Method, adapt
from harness.method_from_config import build_method
from harness.quantized import quantized_layout
from harness.recipe import enable_activation_checkpointing
from harness.result import count_parameters
from harness.run import execute
from harness.simulate import simulate
from harness.weights import random_model
from lors.experts import ExpertLinears, expert_names
from lors.pruning import quantize_model

ROOT = Path(__file__).parents[1]
METHODS = sorted(file.stem for file in (ROOT / "conf" / "method").glob("*.yaml"))
REFUSED = ("none", "shira")  # it does not train, or needs values
TRAINING = [name for name in METHODS if name not in REFUSED]
QUICK = ("spp_gc", "sqft", "geolora")  # lora, lors and full are among the settings
B, T, R = 2, 48, 4
UNCLIPPED = "train.max_grad_norm=null"
HIDDEN, FFN, KEYS, LAYERS, VOCABULARY = 32, 48, 16, 2, 64  # of make_tiny_llama
MEBIBYTE = 2**20


@pytest.fixture
def config(composed):
    """Function from overrides to the config of a simulated step of B x T tokens."""
    small = [f"train.batch_size={B}", f"train.sequence_length={T}", f"adapter.r={R}", "simulate.device=cpu"]
    return lambda *overrides: resolve(composed("mode=simulate", "model=llama2_7b", *small, *overrides))


def experts(model: nn.Module) -> int:
    return sum(isinstance(part, ExpertLinears) or bool(expert_names(part)) for part in model.modules())


def simulated_step(cfg: DictConfig, shape=None) -> dict:
    return simulate(cfg, build_method(cfg), shape or make_tiny_llama().config)


def check(cfg: DictConfig, shape: PretrainedConfig | None = None) -> tuple[dict, dict]:
    """Simulate a step, make the same one on real tensors, and compare; memory of both."""
    shape = shape or make_tiny_llama().config
    method = build_method(cfg)
    if method.name == "gelora":
        method.prepare = Method.prepare.__get__(method)  # its own would choose other ranks
    formats = PRECISIONS[cfg.train.precision]
    model = random_model(shape, formats.base, cfg.sparsity, cfg.pattern, seed=0).cpu()
    if quantized_layout(cfg):
        quantize_model(model, "rtn", bits=cfg.prune.bits, group=cfg.prune.group_size)
    batch = collator(None, "fixed", T)(random_data(VOCABULARY, cfg.train, seed=0)[:B])
    adapted = adapt(method, model, [batch], precision=cfg.train.precision)
    measured = training_cost(adapted, batch, cfg.train, method)
    memory = measured["memory"]

    found = simulated_step(cfg, shape)
    assert found["parameters"] == count_parameters(adapted)
    assert found["flops"]["per_step"] == pytest.approx(measured["flops"]["per_step"], rel=0.03 if experts(model) else 0)
    assert found["memory"]["train_peak"] == pytest.approx(memory["train_peak"], rel=0.02)
    return found["memory"], memory


# ---- against measured steps


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TRAINING]
)
def test_every_method_as_measured_on_a_cpu(config, name) -> None:
    check(config(f"method={name}"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=lors", "train.precision=bf16_mixed", "train.gradient_accumulation=3", "train.logits_at_once=40"),
        ("method=sqft_gc", "train.precision=bf16_mixed", "train.activation_checkpointing=true"),
        ("method=lors", "method.peft.storage=bitmap", "sparsity=0.75", "train.activation_checkpointing=true"),
        ("method=lors", "method.peft.storage=auto", "pattern=2:4", "train.precision=bf16"),
        ("method=lora", "prune.quantize=rtn", "prune.group_size=16", "train.activation_checkpointing=true", UNCLIPPED),
        ("method=lors", "prune.quantize=rtn", "method.peft.bits=4", "train.precision=bf16_mixed"),
        ("method=sqft_gc", "prune.quantize=rtn", "prune.bits=2", "train.precision=bf16"),
        ("method=full", "train.logits_at_once=40", "train.gradient_accumulation=2"),
    ],
)
def test_every_setting_as_measured_on_a_cpu(config, overrides) -> None:
    found, measured = check(config(*overrides))
    assert found["breakdown"] == measured["breakdown"]
    assert found["saved_for_backward"] == measured["saved_for_backward"]
    assert found["peak_phase"] == measured["peak_phase"]


def test_nothing_is_told_of_values_that_are_not_there(config, caplog) -> None:
    with caplog.at_level("INFO", "lors"):
        simulated_step(config("method=mora"))
    assert caplog.messages == []


def test_the_second_copy_of_the_weights_is_not_taken_for_activations(config) -> None:
    """XGBLoRA's W_t lives as long as the model."""
    found = {method: simulated_step(config(f"method={method}"))["memory"] for method in ("xgblora", "lora")}
    linears = 2 * HIDDEN * HIDDEN + 2 * KEYS * HIDDEN + 3 * FFN * HIDDEN
    assert found["xgblora"]["peak_phase"] == found["lora"]["peak_phase"]
    difference = {name: found["xgblora"]["breakdown"][name] - found["lora"]["breakdown"][name] for name in CATEGORIES}
    assert difference["other"] == 4 * LAYERS * linears
    assert difference["activations"] < 0, "the layers that no booster trains keep less"


def test_the_peak_is_found_where_it_is(config) -> None:
    """With hardly any tokens, LoRS is highest while it goes back through a merged weight."""
    found = simulated_step(config("method=lors", "train.batch_size=1", "train.sequence_length=2"))["memory"]
    assert found["peak_phase"] == "backward"
    assert found["peak_module"].startswith("model.layers.0.mlp."), "the last block to go back through"
    layer = found["modules"]["model.layers.*.mlp.up_proj"]
    assert layer["weights"] == LAYERS * 4 * FFN * HIDDEN
    assert layer["adapters"] == LAYERS * 4 * R * (FFN + HIDDEN)
    total = sum(size for layer in found["modules"].values() for size in layer.values())
    assert total == found["train_peak"] == sum(found["breakdown"].values())
    assert tuple(found["breakdown"]) == CATEGORIES


def test_optimizers_of_a_gpu_work_on_all_of_a_list_at_once(config) -> None:
    """AdamW makes square roots of all second moments before it uses the first: as much as is trained."""
    overrides = ("method=full", "train.batch_size=1", "train.sequence_length=2", UNCLIPPED)
    cpu, cuda = (simulated_step(config(*overrides, f"simulate.device={device}")) for device in ("cpu", "cuda"))
    trained = cpu["parameters"]["adapter_bytes"]
    assert cuda["memory"]["peak_phase"] == cpu["memory"]["peak_phase"] == "optimizer"
    assert cuda["memory"]["breakdown"]["other"] > trained > 3 * cpu["memory"]["breakdown"]["other"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lora", "lors", "sqft", "spp_gc", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16_mixed"])
def test_as_measured_by_the_allocator_of_a_gpu(config, name, precision) -> None:
    """A model of which every tensor is large beside the allocator's blocks and the libraries' workspaces."""
    cfg = config(
        f"method={name}", f"train.precision={precision}", "train.batch_size=4", "train.sequence_length=1024",
        "adapter.r=16", "simulate.device=cuda", "model.shape.num_hidden_layers=4",
    )  # fmt: skip
    method, shape = build_method(cfg), AutoConfig.for_model(**OmegaConf.to_container(cfg.model.shape))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape, dtype=PRECISIONS[precision].base)
    batch = collator(None, "fixed", 1024)(random_data(shape.vocab_size, cfg.train, seed=0)[:4])
    batch = {key: tensor.cuda() for key, tensor in batch.items()}
    adapted = adapt(method, model, [batch], precision=precision)
    measured = max(cuda_steps(adapted, batch, cfg, method))
    assert simulate(cfg, method, shape)["memory"]["train_peak"] == pytest.approx(measured, rel=0.03)


def cuda_steps(model: nn.Module, batch: dict, cfg: DictConfig, method) -> list[int]:
    """Allocator peaks of steps after the first, which makes the state of the optimizer."""
    if cfg.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    optimizer = method.optimizer(model.train(), cfg.train)
    peaks = []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        training_step(model, batch, optimizer, method, cfg.train, LiveTensors())
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    return peaks[1:]


@pytest.mark.slow
def test_as_the_authors_measured_on_their_gpu(composed) -> None:
    """Llama-2-7B, 1 x 2048 tokens, r 16 on an A6000: MiB that a method needs beyond LoRS, see analysis/published."""
    peaks = {}
    for name in ("lors", "lora", "sqft_fused", "spp", "spp_gc"):
        step = ["train.precision=bf16", "train.batch_size=1", "train.sequence_length=2048", "adapter.r=16"]
        cfg = resolve(composed("mode=simulate", "model=llama2_7b", "pattern=2:4", f"method={name}", *step))
        shape = AutoConfig.for_model(**OmegaConf.to_container(cfg.model.shape))
        peaks[name] = simulate(cfg, build_method(cfg), shape)["memory"]["train_peak"] / MEBIBYTE
    published = pd.read_csv(simulated.A6000).set_index("method").memory_mib
    assert published["spp"] == "OOM" and cards_needed({"1": peaks["spp"] * MEBIBYTE})[48] is None
    for name in ("lora", "sqft_fused", "spp_gc"):
        logged = float(published[name]) - float(published["lors"])
        assert peaks[name] - peaks["lors"] == pytest.approx(logged, rel=0.03, abs=0.01 * peaks["lors"]), name


# ---- mixtures of experts

MIXTURES = ("olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES)])
@pytest.mark.parametrize(
    "overrides",
    [
        ("method=lors", "train.precision=bf16_mixed", "train.activation_checkpointing=true"),
        ("method=sqft",),
        ("method=full", "train.precision=bf16"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (("method=lors",), ("method=lora", "train.precision=bf16"), ("method=full",))
        ),
    ],
)
def test_a_mixture_whose_experts_have_as_many_tokens_each_as_measured_on_a_cpu(config, name, overrides) -> None:
    """Whatever tokens the router of the measured one gives to each of them."""
    shape = ARCHITECTURES[name].build().config
    found, measured = check(config(*overrides), shape)
    assert found["saved_for_backward"] == pytest.approx(measured["saved_for_backward"], rel=0.03)


# ---- several devices


def test_what_is_sharded_is_divided_and_rounded_up() -> None:
    live = LiveTensors()
    W, x = torch.zeros(10), torch.zeros(3)
    live.count([W], "weights", sharded=True)
    live.count([x], "other")
    with live:
        y = x * 2
        del y
    assert live.at_peak(3).bytes == math.ceil(40 / 3) + 12 + 12
    whole = live.at_peak(3, lambda phase, module: 5)
    assert whole.bytes == math.ceil(40 / 3) + 12 + 12 + 5
    assert whole.by_category()["transients"] == 12 + 5


def test_shards_divide_weights_adapters_and_optimizer_and_hold_one_block_whole(config) -> None:
    step = ("method=lora", "train.batch_size=1", "train.sequence_length=2")  # hardly any activations
    one, four = (simulated_step(config(*step, f"simulate.shards={n}"))["memory"] for n in (1, 4))
    for category in ("weights", "adapters", "optimizer"):
        # The rotary buffer is not sharded, and every tensor is rounded up.
        assert four["breakdown"][category] == pytest.approx(one["breakdown"][category] / 4, rel=0.02, abs=400), category
    model = make_tiny_llama()
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    linears = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN), *3 * [(HIDDEN, FFN)]]
    adapters = sum(4 * R * (a + b) for a, b in linears)
    # The rest of the block's weights, and in the backward pass the rest of its gradients.
    assert four["breakdown"]["transients"] >= 3 / 4 * (block + 2 * adapters)
    assert one["train_peak"] / 4 < four["train_peak"] < one["train_peak"]
    assert four["saved_for_backward"] == one["saved_for_backward"]


def test_one_step_tells_the_peak_on_any_number_of_devices(config) -> None:
    found = simulated_step(config("method=lora", "simulate.shards=3"))["memory"]
    peaks = found["train_peak_by_devices"]
    assert list(peaks) == [str(number) for number in range(1, MOST_CARDS + 1)]
    assert peaks["3"] == found["train_peak"]
    four = simulated_step(config("method=lora", "simulate.shards=4"))["memory"]
    assert (peaks["1"], peaks["4"]) == (four["train_peak_by_devices"]["1"], four["train_peak"])
    assert sorted(list(peaks.values())[1:], reverse=True) == list(peaks.values())[1:]


def test_a_method_that_needs_whole_weights_is_on_one_device(config) -> None:
    found = simulated_step(config("method=geolora"))["memory"]
    assert found["train_peak_by_devices"] == {"1": found["train_peak"]}


def test_the_smallest_number_of_cards_leaves_room_for_what_is_no_tensor() -> None:
    sizes = {"1": 79, "2": 45, "5": 22.4, "64": 14.6}
    peaks = {number: int(size * 2**30) for number, size in sizes.items()}
    assert cards_needed(peaks) == {16: None, 24: 5, 48: 2, 80: 2}


# ---- the run


def overrides(tmp_path: Path) -> list[str]:
    shape = ["hidden_size=64", "intermediate_size=96", "vocab_size=128"]
    return [
        "mode=simulate", "model=tinyllama_1b", "model.layers=2", *(f"model.shape.{field}" for field in shape),
        "adapter.r=4", "train.batch_size=1", "train.sequence_length=32", f"runs_root={tmp_path}",
    ]  # fmt: skip


def test_a_run_writes_a_result_like_the_others_and_is_not_repeated(composed, tmp_path, capsys) -> None:
    result = execute(composed(*overrides(tmp_path), "train=alpaca", "data=alpaca", "train.sequence_length=32"))
    assert result["status"] == "ok", result["error"]
    memory = result["memory"]
    assert (memory["kind"], memory["device"], memory["shards"]) == ("simulated", "cuda", 1)
    assert sum(memory["breakdown"].values()) == memory["train_peak"] > 0
    assert result["flops"]["per_step"] > 0 and result["parameters"]["trainable"] > 0
    assert result["loss"]["first"] is None and result["zeros"] is None and result["eval"] is None
    printed = capsys.readouterr().out
    for part in ("at the peak of a training step (simulated)", "transients", "GFLOP a step", "one device (cuda)"):
        assert part in printed
    assert "1 x 16 GB, 1 x 24 GB" in printed and "1 x 32 tokens on each card" in printed and "CUDA context" in printed
    again = execute(composed(*overrides(tmp_path), "train=alpaca", "data=text", "data.path=x", "eval=none"))
    assert again["environment"]["end"] == result["environment"]["end"], "data and scores are not part of the key"
    assert len(list(tmp_path.rglob("result.json"))) == 1
    assert run_key(resolve(composed(*overrides(tmp_path), "train=alpaca", "simulate.shards=2"))) != result["key"]


def test_simulated_jobs_of_a_sweep_share_its_process(composed, tmp_path, monkeypatch, capsys) -> None:
    specification = importlib.util.spec_from_file_location("run_of_a_sweep", ROOT / "run.py")
    run = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(run)
    monkeypatch.setattr(run, "start_afresh", lambda *_, **__: pytest.fail("a process was started"))
    assert run.run_in_sweep(composed(*overrides(tmp_path)), None) == 0
    [file] = tmp_path.rglob("result.json")
    assert json.loads(file.read_text())["status"] == "ok"
    assert capsys.readouterr().out == "", "the line of the sweep says it"


# ---- the table


def test_the_table_says_what_fits_where(composed, tmp_path, capsys) -> None:
    for name in ("lora", "lors"):
        execute(composed(*overrides(tmp_path), f"method={name}"))
    simulated.run(type("Options", (), {"runs": [tmp_path], "output": tmp_path / "out"}))
    table = simulated.peaks(load([tmp_path]))
    assert list(table.method) == ["lora", "lors"] and list(table.cards) == [dict.fromkeys(CARDS, 1)] * 2
    assert table.relative[0] == 1 and 0 < table.relative[1] == pytest.approx(table.peak[1] / table.peak[0])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["simulated.md"]
    text = (tmp_path / "out" / "simulated.md").read_text()
    assert "| 16 GB | 24 GB | 48 GB | 80 GB |" in text and "1.5 GiB stay free" in text


def test_the_authors_log_stands_beside_the_simulation(tmp_path) -> None:
    step = {**simulated.A6000_STEP, "precision": "bf16", "storage": "dense"}
    table = pd.DataFrame(
        [{**step, "method": name, "peak": size * MEBIBYTE} for name, size in (("lors", 24000), ("sqft_fused", 42528))]
    )
    [*_, row] = simulated.a6000_table(table)
    assert row.endswith("| 44,236 | 42,528 | +18,224 | +18,528 |")
    assert list(simulated.a6000_table(table.assign(tokens=512))) == [], "another step says nothing about the log"
