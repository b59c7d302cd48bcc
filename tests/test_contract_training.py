"""The contract of a method, training: its gradients in float64, bfloat16 autocast and a resumed run through the plain
Trainer of transformers, with the optimizer, the callbacks and the clipping that the method brings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract import PARTIAL, ROWS, TRAINED, batch, composed, logits, method_of, prune, pruned, trainable, trained
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import OPTConfig, OPTForCausalLM, Trainer, TrainingArguments, default_data_collator

from harness.method import Method, adapt, finish
from lors.blocks import decoder_linears
from lors.sparsity import supports, zero_report

DRAWS = "lors gradient=sampled gradient_until=0.7"  # in the backward pass of its first two steps of three


def fit(
    model: nn.Module, method: Method, folder: Path, steps: int, resume: Path | None = None, **arguments: object
) -> Trainer:
    """Train with the plain Trainer of transformers on the CPU."""
    if method.max_grad_norm is not None:
        arguments["max_grad_norm"] = method.max_grad_norm
    own_optimizer = method.optimizer(model, composed(method.name).train)
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **arguments,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=ROWS,
        data_collator=default_data_collator,
        optimizers=(own_optimizer, None),
        callbacks=method.callbacks(),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize("name", [*TRAINED, DRAWS])
def test_a_training_in_bf16_autocast_and_one_that_is_resumed_end_alike(name, tmp_path):
    method, before = method_of(name), supports(pruned(dtype=torch.bfloat16))
    model = adapt(method, pruned(dtype=torch.bfloat16), [batch()], precision="bf16_mixed")
    start = {key: value.clone() for key, value in model.named_parameters()}  # XGBLoRA trains one part after another
    trainer = fit(model, method, tmp_path / "whole", steps=3, bf16=True, save_steps=2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and torch.tensor(losses).isfinite().all()
    still = [key for key, value in trainable(model).items() if torch.equal(value, start[key])]
    assert not still or (name in PARTIAL and len(still) < len(trainable(model)))
    for key, value in trainable(model).items():
        assert value.dtype == torch.float32, key
        assert value.isfinite().all(), key

    # Another start, which the checkpoint must replace.
    resumed = adapt(method, pruned(dtype=torch.bfloat16), [batch()], seed=1, precision="bf16_mixed")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    fit(resumed, method, tmp_path / "resumed", steps=3, resume=checkpoint, bf16=True, save_strategy="no")
    for key, value in trainable(model).items():
        assert torch.equal(value, trainable(resumed)[key]), key
    assert torch.equal(logits(model.eval()), logits(resumed.eval()))
    merged = finish(method, model, before, method.merges[0])
    assert zero_report(before, merged, "unstructured")["lost"] == 0
    if method.merges[0] != "adapter":
        assert len({parameter.dtype for parameter in merged.parameters()}) == 1


def loss_in_float64(model: nn.Module, changed: dict[str, Tensor]) -> Tensor:
    """The models' own losses cast to float32."""
    output = functional_call(model, changed, kwargs=batch())
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten())


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_agree_with_finite_differences_in_float64(name):
    """Of the loss of an OPT, along a random direction among the changes that the method can make.

    A Llama computes its norms in float32 whatever its type, and has no biases.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    smooth = {"activation_function": "gelu", "dropout": 0.0}  # finite differences dislike a kink
    base = prune(OPTForCausalLM(OPTConfig(**shape, **smooth, vocab_size=64, word_embed_proj_dim=32)))
    for layer in decoder_linears(base).values():
        layer.bias.data.normal_(std=0.1)
    overrides = ["adapter.targets=[q_proj,k_proj,v_proj,out_proj,fc1,fc2]"]
    if name.startswith("lors"):  # whose training gradient is an estimate by design
        overrides.append("method.peft.gradient=exact")
    model = trained(method_of(name, *overrides), base).double()

    loss_in_float64(model, {}).backward()
    generator = torch.Generator().manual_seed(1)
    directions, slope = {}, 0.0
    for key, parameter in trainable(model).items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.grad is None and name in PARTIAL:
            continue
        directions[key] = direction * (parameter.grad != 0)  # full: a pruned weight cannot move
        slope += (directions[key] * parameter.grad).sum().item()

    step, losses = 1e-6, []
    for sign in (1, -1):
        moved = {key: value + sign * step * directions.get(key, 0) for key, value in trainable(model).items()}
        losses.append(loss_in_float64(model, moved).item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-8)
