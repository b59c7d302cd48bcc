"""The whole path on a tiny random model, offline: results, cache, resume after a kill, failures, profiles, sweeps."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tiny_llama
from omegaconf import DictConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM

from harness import run as harness_run
from harness.config import resolve
from harness.errors import BadInput
from harness.identity import run_key
from harness.run import execute
from harness.store import read_result
from harness.train import MeasuredTrainer
from lors.pruning import prune_model
from lors.sparsity import sparsity_of

FIELDS = (
    "schema key status error mode method model pruner pattern sparsity support seed config provenance environment "
    "parameters end_state zeros memory time flops loss eval baselines variants artifacts"
).split()

NO_SCORES = ("eval.tasks=[]", "eval.perplexity=null", "eval.baselines=false")
SHORT = (*NO_SCORES, "train.steps=1", "train.timing_warmup=0")


@pytest.fixture
def tiny(composed, tiny_checkpoint, tiny_sources, tmp_path) -> Callable[..., DictConfig]:
    """Function from overrides to the config of a run of a few seconds."""
    return lambda *overrides: composed(*tiny_overrides(tiny_checkpoint, tiny_sources, tmp_path), *overrides)


def tiny_overrides(checkpoint: Path, sources: Path, folder: Path) -> list[str]:
    words = "model=hf data=alpaca eval=zeroshot prune.samples=4 prune.sequence_length=32 eval.tasks=[arc_easy,rte] "
    words += "adapter.r=4 train.steps=4 train.batch_size=2 train.sequence_length=96 train.timing_warmup=1 "
    words += "train.init_rows=4 train.checkpoint_every=1"
    places = {"model.path": checkpoint, "data.path": f"{sources}/instructions.jsonl", "eval.data_root": sources}
    places |= {"prune.text": f"{sources}/text.jsonl", "runs_root": f"{folder}/runs", "cache_root": f"{folder}/cache"}
    perplexity = f"eval.perplexity={{text:{sources}/text.jsonl,window:32}}"
    return [*words.split(), *(f"{key}={place}" for key, place in places.items()), perplexity]


def folder_of(result: dict, cfg: DictConfig) -> Path:
    return Path(cfg.runs_root) / cfg.name / result["key"]


def numbers(result: dict) -> dict:
    """What must be the same every time: everything but clocks, process memory and folders."""
    kept = {
        name: result[name] for name in FIELDS if name not in ("config", "provenance", "environment", "time", "memory")
    }
    memory = {name: value for name, value in result["memory"].items() if name != "process_rss_peak"}
    return {**kept, "memory": memory}


def test_a_run_from_end_to_end(tiny, capsys, no_network, monkeypatch) -> None:
    cfg = tiny("method=lors", "save_merged=true")
    result = execute(cfg)
    printed = capsys.readouterr().out
    folder = folder_of(result, cfg)

    assert list(result) == FIELDS
    assert result["status"] == "ok" and result["error"] is None
    assert read_result(folder / "result.json") == result
    assert result["environment"]["kernels"]["merge"], "which code has merged is on record"
    assert result["support"]["sparsity"] == pytest.approx(0.5, abs=1e-3) and len(result["support"]["sha256"]) == 64
    assert result["zeros"] == {
        "requested": 0.5,
        "after_prune": 0.5,
        "after_merge": pytest.approx(0.5, abs=1e-3),
        "lost": 0,
        "gained": result["zeros"]["gained"],
        "pattern_valid": True,
        "mergeable": True,
    }
    memory = result["memory"]
    assert memory["kind"] == "live_tensors"
    assert sum(memory["breakdown"].values()) == memory["train_peak"] > memory["eval_peak"] > 0
    assert memory["init_peak"] > memory["breakdown"]["weights"]
    assert result["time"]["steps"] == 3 and result["time"]["warmup_steps"] == 1
    assert set(result["time"]["phases"]) == set("load prune baselines measure init train merge evaluate".split())
    assert result["flops"]["per_step"] > 0
    assert result["parameters"]["adapter_bytes"] == 4 * result["parameters"]["trainable"]
    assert result["parameters"]["adapted_share"] == 1
    assert all(isinstance(value, float) for value in result["loss"].values())
    for scores in (result["eval"], result["baselines"]["dense"], result["baselines"]["pruned"]):
        assert set(scores["tasks"]) == {"arc_easy", "rte"}
        assert scores["tasks"]["rte"]["metric"] == "acc" and scores["tasks"]["rte"]["n"] == 8
        assert scores["perplexity"]["value"] > 1
    assert result["loss"]["eval_before"] == result["baselines"]["pruned"]["perplexity"]["loss"]
    assert result["loss"]["eval_after"] == result["eval"]["perplexity"]["loss"]

    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[0]["loss"] == result["loss"]["first"] and steps[-1]["loss"] == result["loss"]["last"]
    kept = {".lock", "adapter", "config.yaml", "log.txt", "merged", "result.json", "steps.jsonl"}
    assert {entry.name for entry in folder.iterdir()} <= kept
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert sparsity_of(merged) == pytest.approx(0.5, abs=1e-3)
    pruned = next((Path(cfg.cache_root) / "pruned").glob("*/config.json")).parent
    base = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    tokens = torch.arange(10)[None] + 5
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, folder / "adapter")(tokens).logits
        torch.testing.assert_close(logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)
    for text in ("50.00% after pruning", "every zero kept", "at the peak of a training step", "step time",
                 "arc_easy (acc)", "average", "perplexity", "dense", "fine-tuned", "±", str(folder)):  # fmt: skip
        assert text in printed, text

    # The pruned model and the scores of the baselines are there for all methods.
    monkeypatch.setattr("harness.models.prune_model", lambda *_, **__: pytest.fail("pruned twice"))
    monkeypatch.setattr("harness.models.evaluate", lambda *_: pytest.fail("scored twice"))
    second = execute(tiny("method=lors", "seed=1", "train.steps=2"))
    assert second["status"] == "ok", second["error"]
    assert second["baselines"] == result["baselines"]


def test_a_finished_run_is_not_repeated_unless_forced(tiny, capsys, monkeypatch) -> None:
    """And what transformers reports is in its log."""
    cfg, real = tiny(*NO_SCORES, "train.steps=1"), harness_run.train

    def train(*arguments: object) -> object:
        logging.getLogger("transformers.modeling_utils").warning("of note")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(harness_run, "train", train)
        first = execute(cfg)
    assert "WARNING transformers.modeling_utils: of note" in (folder_of(first, cfg) / "log.txt").read_text()
    assert "of note" not in "".join(capsys.readouterr())
    monkeypatch.setattr(harness_run, "read_inputs", lambda *_: pytest.fail("the run was repeated"))
    assert execute(cfg) == first
    printed = capsys.readouterr().out
    assert "not repeated" in printed and first["key"] in printed
    monkeypatch.undo()
    again = execute(tiny(*NO_SCORES, "train.steps=1", "force=true"))
    assert numbers(again) == numbers(first)
    assert again["environment"] != first["environment"] or again["time"] != first["time"]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the run sees it as a failure."""


def test_a_killed_run_ends_with_the_numbers_of_an_undisturbed_one(tiny, tmp_path, monkeypatch) -> None:
    """Killed in the third step, and then in its second score."""
    settings = ["method=lora", "eval.tasks=[rte]"]
    undisturbed = execute(tiny(*settings, f"runs_root={tmp_path}/other"))
    cfg = tiny(*settings)
    real_log, real_evaluate, scored = MeasuredTrainer.log, harness_run.evaluate, []

    def log(trainer, logs, *rest):
        if trainer.state.global_step == 3:
            raise Killed
        return real_log(trainer, logs, *rest)

    def evaluate(*arguments):
        if scored:
            raise Killed
        scored.append(1)
        return real_evaluate(*arguments)

    for place, name, killing in ((MeasuredTrainer, "log", log), (harness_run, "evaluate", evaluate)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, killing)
            execute(cfg)
        folder = Path(cfg.runs_root) / cfg.name / undisturbed["key"]
        assert not (folder / "result.json").exists() and list(folder.glob("checkpoint-*"))
    resumed = execute(cfg)
    assert numbers(resumed) == numbers(undisturbed)
    assert resumed["time"]["steps"] + resumed["time"]["warmup_steps"] == 4


def test_lora_gives_three_rows_from_one_training(tiny) -> None:
    result = execute(tiny("method=lora", "pattern=2:4", "eval.tasks=[]"))
    assert result["end_state"] == "adapter" and list(result["variants"]) == ["remasked", "dense"]
    remasked, dense = (result["variants"][name]["zeros"] for name in ("remasked", "dense"))
    assert result["zeros"]["after_merge"] is None and not result["zeros"]["mergeable"]
    assert remasked["lost"] == 0 and remasked["pattern_valid"] and remasked["mergeable"]
    assert dense["lost"] > 0 and not dense["pattern_valid"] and not dense["mergeable"]
    adapter, remasked, dense = (
        row["eval"]["perplexity"]["loss"] for row in (result, *result["variants"].values())
    )  # fmt: skip
    assert adapter == pytest.approx(dense, rel=1e-6), "the same function, rounded elsewhere"
    assert abs(adapter - remasked) > 10 * abs(adapter - dense)


@pytest.fixture
def sparse_folder(tiny_checkpoint, tmp_path) -> Path:
    """A model that was pruned 2:4 elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    prune_model(model, "magnitude", sparsity=None, pattern="2:4", calibration=None)
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "sparse")
    model.save_pretrained(folder)
    return folder


def test_a_model_that_comes_sparse_is_measured_and_refused_if_something_else_is_said_of_it(
    tiny, sparse_folder, tmp_path
) -> None:
    for said in ("sparsity=0.7", "sparsity=0", "pattern=1:4"):
        with pytest.raises(BadInput, match=r"must be what the model has with prune=none, 0\.5 and 2:4"):
            execute(tiny("prune=none", said, f"model.path={sparse_folder}", "eval.tasks=[]"))
    assert not list((tmp_path / "runs").rglob("result.json"))
    result = execute(tiny("prune=none", f"model.path={sparse_folder}", "eval.tasks=[]"))
    assert result["status"] == "ok", result["error"]
    assert (result["pruner"], result["sparsity"], result["pattern"]) == ("none", 0.5, "2:4")
    assert result["support"]["sparsity"] == 0.5 and result["support"]["pattern"] == "2:4"
    assert result["zeros"]["lost"] == 0 and result["zeros"]["pattern_valid"]
    assert result["baselines"]["dense"] is None, "nobody knows the dense model"
    assert result["baselines"]["pruned"]["perplexity"]["loss"] == result["loss"]["eval_before"]
    again = execute(tiny("prune=none", "pattern=2:4", f"model.path={sparse_folder}", "eval.tasks=[]"))
    assert again["environment"] == result["environment"], "the same run, with what it has said aloud"


def test_nothing_of_the_harness_is_on_the_device_when_the_training_starts(tiny, monkeypatch) -> None:
    """Tensors that are alive: those of the model, what an optimizer has of them, and a batch; the rest is small."""
    seen = []

    class Spy(harness_run.Meter):
        def on_train_begin(self, args, state, control, model, **kwargs) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            gc.collect()
            known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
            alive = (entry for entry in gc.get_objects() if isinstance(entry, torch.Tensor) and id(entry) not in before)
            largest = min(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
            seen.extend(
                tuple(tensor.shape) for tensor in alive
                if tensor.untyped_storage().data_ptr() not in known and tensor.numel() >= largest
                and tensor.dtype != torch.int64  # token ids
            )  # fmt: skip

    gc.collect()
    before = {id(entry) for entry in gc.get_objects() if isinstance(entry, torch.Tensor)}
    monkeypatch.setattr(harness_run, "Meter", Spy)
    execute(tiny("method=lora", *SHORT))
    assert seen == []


def test_a_good_result_stays_when_its_repetition_fails(tiny, capsys, monkeypatch) -> None:
    cfg = tiny("method=lora", *SHORT)
    good = execute(cfg)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        assert execute(tiny("method=lora", "save_merged=true", *SHORT))["status"] == "failed"
    assert "the good result from before stays" in capsys.readouterr().out
    assert read_result(folder_of(good, cfg) / "result.json") == good
    assert execute(cfg) == good
    merged = execute(tiny("method=lora", "save_merged=true", *SHORT))
    assert merged["status"] == "ok" and (folder_of(good, cfg) / "merged" / "model.safetensors").exists()
    assert merged["loss"] == good["loss"]


def test_what_a_kill_after_the_result_has_left_goes_at_the_next_start(tiny, monkeypatch) -> None:
    cfg = tiny("method=lora", *SHORT)

    def kill(_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(harness_run.RunStore, "drop_progress", kill)
        execute(cfg)
    folder = next(Path(cfg.runs_root).rglob("result.json")).parent
    assert list(folder.glob("checkpoint-*")) and (folder / "parts").exists()
    execute(cfg)
    assert not list(folder.glob("checkpoint-*")) and not (folder / "parts").exists()


def test_the_dense_model_is_fine_tuned_and_then_pruned(tiny) -> None:
    """Its training is that of the dense control, its zeros are those that were asked for."""
    dense = execute(tiny("prune=none", "sparsity=0", "eval.tasks=[rte]"))
    assert (dense["pruner"], dense["sparsity"], dense["zeros"]["after_prune"]) == ("none", 0.0, 0.0)
    assert dense["baselines"]["dense"] == dense["baselines"]["pruned"]
    assert dense["loss"]["eval_after"] != dense["loss"]["eval_before"]
    after = execute(tiny("prune.when=after", "eval.held_out=null", "eval.tasks=[rte]"))
    assert after["status"] == "ok" and after["loss"]["last"] == dense["loss"]["last"]
    assert after["end_state"] == "merged" and after["variants"] == {}
    zeros = after["zeros"]
    assert (
        zeros["after_prune"] == zeros["after_merge"] == pytest.approx(after["sparsity"], abs=0.02)
        and zeros["mergeable"]
    )
    assert after["support"]["sparsity"] == pytest.approx(after["sparsity"], abs=0.02)
    assert after["baselines"]["pruned"] is None
    assert after["baselines"]["dense"] == dense["baselines"]["dense"]
    assert after["loss"]["eval_before"] == dense["loss"]["eval_before"] != after["loss"]["eval_after"]
    assert after["eval"] != dense["eval"]
    assert run_key(resolve(tiny("eval.held_out=null"))) != after["key"]
    with pytest.raises(BadInput, match=r"prune.when=after: method=lora leaves its adapter beside the weights"):
        execute(tiny("method=lora", "prune.when=after"))


def test_the_pruned_model_as_it_is(tiny) -> None:
    result = execute(tiny("method=none"))
    assert result["status"] == "ok"
    assert result["eval"] == result["baselines"]["pruned"]
    assert (
        result["parameters"]["trainable"] == 0
        and result["flops"]["per_step"] is None
        and result["loss"]["first"] is None
    )


def test_a_nan_loss_stops_the_run_and_the_result_says_at_which_step(tiny, capsys) -> None:
    cfg = tiny("method=lora", "eval.tasks=[]", "train.learning_rate=1e30", "train.max_grad_norm=null")
    result = execute(cfg)
    assert result["status"] == "failed"
    assert result["error"]["type"] == "NonFiniteLoss" and "step 2" in result["error"]["message"]
    assert "NonFiniteLoss" in result["error"]["traceback"]
    assert result["baselines"]["dense"] and result["memory"]["train_peak"], "what was known is kept"
    assert json.loads((folder_of(result, cfg) / "result.json").read_text())["status"] == "failed"
    assert "step 2" in capsys.readouterr().out


def test_out_of_memory_is_a_status_of_its_own_and_can_be_tried_again(tiny, monkeypatch) -> None:
    cfg = tiny("train.precision=bf16", *SHORT)  # test_artifacts has runs in bf16_mixed
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough")):

        def full(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(harness_run, "train", full)
            assert execute(cfg)["status"] == "oom"
    result = execute(cfg)
    assert result["status"] == "ok" and result["zeros"]["lost"] == 0


def test_a_method_that_breaks_its_promise_about_zeros_fails(tiny, monkeypatch) -> None:
    result = execute(tiny("method=lora", "method.keep_zeros=true", "method.merges=[dense]", *SHORT))
    assert result["status"] == "ok", "a dense merge promises nothing"
    monkeypatch.setattr(harness_run, "finish", lambda method, model, M, variant, **_: ones(model))
    broken = execute(tiny("method=lors", *SHORT))
    assert broken["status"] == "failed" and "keep_zeros" in broken["error"]["message"]


def ones(model: PeftModel) -> torch.nn.Module:
    base = model.unload()
    for parameter in base.parameters():
        parameter.data.fill_(1)
    return base


def test_a_random_weight_that_is_drawn_as_zero_is_not_pruned() -> None:
    shape = make_tiny_llama(initializer_range=0.0).config  # every weight is
    model = harness_run.random_model(shape, torch.bfloat16, 0.5, "2:4", seed=0)
    assert sparsity_of(model) == 0.5


def test_profile_needs_no_weights_no_data_and_no_scores(composed, tmp_path, no_network) -> None:
    words = "mode=profile model=tinyllama_1b model.layers=1 model.shape.hidden_size=64 model.shape.vocab_size=128 "
    words += "model.shape.intermediate_size=96 adapter.r=4 pattern=2:4 train.steps=3 train.batch_size=1 "
    words += "train.sequence_length=32 train.timing_warmup=1 train.precision=bf16"
    cfg = composed(*words.split(), f"runs_root={tmp_path}", f"cache_root={tmp_path}/cache")
    result = execute(cfg)
    assert result["status"] == "ok", result["error"]
    assert result["zeros"]["after_prune"] == 0.5 and result["zeros"]["pattern_valid"]
    assert result["time"]["steps"] == 2 and result["memory"]["train_peak"] > 0 and result["flops"]["per_step"] > 0
    assert result["eval"] is None and result["baselines"] == {"dense": None, "pruned": None}
    assert result["config"]["model"]["layers"] == 1
    assert result["time"]["tokens_per_second"] > 0
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["devices"], "nothing but the lock"
