"""Small pruned models with LoRS adapters for the tests, and what the tests look at in them."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import lors

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # so that the layers matter beside the residual stream
}
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = {"bitmap": "unstructured", "n:m": "2:4"}  # storage -> the pattern of the model that it is tried on


def pruned_model(
    dtype: torch.dtype = torch.float32, pattern: str = "unstructured", bias: bool = False
) -> PreTrainedModel:
    """A small random causal model (Qwen2 if ``bias``), half of each decoder weight zero."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)) if bias else LlamaForCausalLM(LlamaConfig(**SHAPE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                scores = torch.rand_like(parameter).reshape(-1, 4)
                kept = scores.argsort(-1).argsort(-1) < 2 if pattern == "2:4" else scores > 0.5
                parameter.mul_(kept.reshape(parameter.shape))
            elif name.endswith("bias"):
                parameter.normal_()
    return model.to(dtype).eval()


def adapted_model(model: PreTrainedModel | None = None, seed: int = 1, **options: object) -> PeftModel:
    """``pruned_model`` with a LoRS adapter as after training: no factor is zero. alpha differs from r."""
    options = {"r": 4, "lora_alpha": 3, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(pruned_model() if model is None else model, lors.LorsConfig(**options))
    shake(model, seed)
    return model.eval()


def shake(model: nn.Module, seed: int) -> None:
    """Give every B values of the size of a trained one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lors_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the decoder weights by the names of the model without adapters."""
    found = {}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain.endswith("proj.weight"):
            found[plain] = parameter.detach().clone()
    return found


def lors_layers(model: nn.Module) -> dict[str, lors.LorsLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, lors.LorsLinear)}
