"""Tiny random models of the decoder-only architectures of transformers, and what the library is to make of each.

Two blocks where the architecture allows it, hidden 32, vocabulary 64, made from configs without any download.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # so that the layers matter beside the residual stream
}
FALCON = {"head_dim": None, "ffn_hidden_size": 48}
LATENT = {  # attention over a compressed key and value; the width of a head follows from its two parts
    **{"head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}
DEEPSEEK = {
    **{"n_routed_experts": 4, "num_local_experts": None, "n_group": 1, "topk_group": 1},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1},
}
DBRX = {
    **{"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    **dict.fromkeys(["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]),
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
}
MAMBA_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
NEMOTRON = {
    **{"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8},
}
DELTA_NET = {
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "layer_types": ["linear_attention", "full_attention"],
}
ZAMBA = {  # the hybrid layers have the same parameters in modules of their own
    **{"num_hidden_layers": 4, "num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "mamba_d_state": 8,
}
GEMMA3N = {
    **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
    "laurel_rank": 4,
}


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and what is refused.

    Attributes:
        name: Of the classes: <name>Config and <name>ForCausalLM.
        fields: Of the config, beyond ``SHAPE``; None leaves one of ``SHAPE`` out.
        model: The class of the model, where its name is another.
        not_pruned: Modules of a block for which the pruner refuses the model, as a regular expression.
        not_adapted: The same for the tuner with its default targets; without these modules it takes the model.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    not_pruned: str = ""
    not_adapted: str = ""

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, f"{self.name}Config")

    @property
    def exclude(self) -> str | None:
        """``exclude_modules`` with which the tuner takes the model."""
        return rf".*\.({self.not_adapted})(\..*)?" if self.not_adapted else None

    def build(self) -> PreTrainedModel:
        """The same model at each call, in evaluation mode."""
        shape = {key: value for key, value in (SHAPE | self.fields).items() if value is not None}
        config = getattr(transformers, f"{self.name}Config")(**shape)
        torch.manual_seed(0)
        model = getattr(transformers, self.model or f"{self.name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # biases, and scales that would keep a gradient from what they scale
                    parameter.normal_(std=0.1)
        return model.eval()


# Bloom reads the weights of two layers only where it imitates tensor parallelism.
PLAIN = (
    "Apertus Arcee BioGpt BitNet Bloom Cohere Cohere2 DiffLlama Ernie4_5 Exaone4 Gemma Gemma2 Glm Glm4 GPTNeoX Granite "
    "Helium HunYuanDenseV1 Jais2 Llama Ministral Mistral ModernBertDecoder Mpt NanoChat Nemotron Olmo Olmo2 Olmo3 "
    "Persimmon Phi3 Qwen2 Qwen3 SeedOss SmolLM3 StableLm Starcoder2 VaultGemma"
)
EVERY = {
    **{name.lower(): Architecture(name) for name in PLAIN.split()},
    "codegen": Architecture("CodeGen", {"n_inner": 48, "rotary_dim": 8}),
    "ctrl": Architecture("CTRL", {"dff": 48}, model="CTRLLMHeadModel"),
    # FalconLinear, an nn.Linear with a forward function of its own.
    "falcon_7b": Architecture("Falcon", FALCON),
    "falcon_40b": Architecture("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_rw": Architecture(
        "Falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "gemma3": Architecture("Gemma3Text", model="Gemma3ForCausalLM"),
    "gpt_bigcode": Architecture("GPTBigCode", {"n_inner": 48}),
    "gpt_neo": Architecture("GPTNeo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gptj": Architecture("GPTJ", {"n_inner": 48, "rotary_dim": 8}),
    "minicpm3": Architecture("MiniCPM3", LATENT),
    "opt": Architecture("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    # Two more linears around the blocks, and the norms behind the sublayers.
    "opt_350m": Architecture("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi": Architecture("Phi", {"num_key_value_heads": 4}),
    "xglm": Architecture("XGLM", {"ffn_dim": 48}),
    "youtu": Architecture("Youtu", LATENT),
    # Experts as parameters of three dimensions; where they are not read one by one the pruner refuses the model.
    "aria": Architecture("AriaText", EXPERTS | {"moe_num_experts": 4}),
    "dbrx": Architecture("Dbrx", DBRX, not_pruned="ffn"),
    "deepseek_v3": Architecture("DeepseekV3", LATENT | EXPERTS | DEEPSEEK),
    "gpt_oss": Architecture("GptOss", EXPERTS),
    "granite_moe": Architecture("GraniteMoe", EXPERTS),
    "jetmoe": Architecture("JetMoe", EXPERTS | {"kv_channels": 8}),
    "mixtral": Architecture("Mixtral", EXPERTS),
    "olmoe": Architecture("Olmoe", EXPERTS),
    "qwen3_moe": Architecture("Qwen3Moe", EXPERTS),
    # One output: no rank but 1 fits.
    "qwen2_moe": Architecture("Qwen2Moe", EXPERTS, not_adapted=r"mlp\.shared_expert_gate"),
    # Routers that are linear layers by class and return scores and choices.
    "llama4": Architecture(
        "Llama4Text",
        EXPERTS | {"intermediate_size_mlp": 48},
        model="Llama4ForCausalLM",
        not_pruned="feed_forward",
        not_adapted=r"feed_forward\.router",
    ),
    "phimoe": Architecture("Phimoe", EXPERTS, not_pruned="mlp", not_adapted=r"mlp\.router"),
    # Convolutions and states in the blocks, and linears whose weight the block reads itself.
    "bamba": Architecture(
        "Bamba", MAMBA_HEADS | {"attn_layer_indices": [1]}, not_pruned="mamba", not_adapted=r"mamba\.out_proj"
    ),
    "falcon_h1": Architecture(
        "FalconH1", MAMBA_HEADS | {"mamba_d_ssm": 64}, not_pruned="mamba", not_adapted=r"mamba\.out_proj"
    ),
    "falcon_mamba": Architecture(
        "FalconMamba", {"state_size": 8}, not_pruned="mixer", not_adapted=r"mixer\.(x|dt|out)_proj"
    ),
    "jamba": Architecture(
        "Jamba",
        EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        not_pruned="(mamba|feed_forward)",
        not_adapted=r"mamba\.dt_proj",
    ),
    "lfm2": Architecture("Lfm2", {"layer_types": ["conv", "full_attention"]}, not_pruned="conv"),
    "mamba": Architecture(
        "Mamba", {"state_size": 8, "time_step_rank": 4}, not_pruned="mixer", not_adapted=r"mixer\.(x|dt|out)_proj"
    ),
    "mamba2": Architecture(
        "Mamba2",
        {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
        not_pruned="mixer",
        not_adapted=r"mixer\.out_proj",
    ),
    "nemotron_h": Architecture("NemotronH", NEMOTRON, not_pruned="mixer", not_adapted=r"mixer\.out_proj"),
    "qwen3_5": Architecture("Qwen3_5Text", DELTA_NET, model="Qwen3_5ForCausalLM", not_pruned="linear_attn"),
    "qwen3_next": Architecture(
        "Qwen3Next", EXPERTS | DELTA_NET, not_pruned=r"\w+", not_adapted=r"mlp\.shared_expert_gate"
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemma", {"block_types": ["recurrent", "attention"]}, not_pruned="temporal_block"
    ),
    "zamba": Architecture("Zamba", ZAMBA | {"head_dim": 16}, not_pruned="mamba", not_adapted="shared_transf"),
    "zamba2": Architecture(
        "Zamba2",
        ZAMBA | {"n_mamba_heads": 4, "adapter_rank": 8},
        not_pruned="mamba",
        not_adapted=r"shared_transformer|mamba\.out_proj",
    ),
    # Clamps the weight of one layer and multiplies with the clamped weight of another, in training.
    "gemma3n": Architecture(
        "Gemma3nText", GEMMA3N, model="Gemma3nForCausalLM", not_adapted=r"altup\.(correction|prediction)_coefs"
    ),
    # Conv1D: a matrix that lies the other way round; there is no linear layer to adapt.
    "gpt2": Architecture(
        "GPT2", {"n_inner": 48}, model="GPT2LMHeadModel", not_pruned=r"\w+\.c_\w+", not_adapted=r"\w+\.c_\w+"
    ),
    "openai_gpt": Architecture(
        "OpenAIGPT", model="OpenAIGPTLMHeadModel", not_pruned=r"\w+\.c_\w+", not_adapted=r"\w+\.c_\w+"
    ),
    # Rescales two layers of each block in place when it goes from training to evaluation.
    "rwkv": Architecture("Rwkv", not_adapted=r"attention\.output|feed_forward\.value"),
}
ARCHITECTURES = {name: architecture for name, architecture in EVERY.items() if architecture.exists}


def expert_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Views of the matrices of fused experts, out x in, named like the linear layers that they become; found without
    the library's own rule."""
    return {
        f"{name}.{key}.{index}": matrix.t() if getattr(part, "is_transposed", False) else matrix
        for name, part in model.named_modules()
        if hasattr(part, "is_transposed") or type(part).__name__ == "JetMoeParallelExperts"
        for key, parameter in part.named_parameters(recurse=False)
        if parameter.ndim == 3
        for index, matrix in enumerate(parameter.detach())
    }
