"""Tiny random models of the decoder-only architectures of transformers, and what the library is to make of each.

Two blocks where the architecture allows it, hidden 32, vocabulary 64, made from configs without any download. A
refusal is given as a regular expression of the layers that its message may name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
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
MULTI_HEAD = {"num_key_value_heads": 4}
LATENT = {  # attention over a compressed key and value; the width of a head follows from its two parts
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
DELTA_NET = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
RECURRENT_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
SHARED_TRANSFORMER = {  # the hybrid layers have the same parameters in modules of their own
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and what is refused.

    ``tuner_refuses`` is for the default targets. With ``exclude`` as ``exclude_modules`` the tuner takes the model.
    """

    name: str  # of the classes: <name>Config and <name>ForCausalLM
    fields: dict[str, Any] = field(default_factory=dict)
    model: str = ""  # the class of the model, where its name is another
    pruner_refuses: str | None = None
    tuner_refuses: str | None = None
    exclude: str | None = None

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, f"{self.name}Config")

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


WORK = {
    "apertus": Architecture("Apertus"),
    "arcee": Architecture("Arcee"),
    "biogpt": Architecture("BioGpt"),
    "bitnet": Architecture("BitNet"),
    # Reads the weights of two layers only where it imitates tensor parallelism.
    "bloom": Architecture("Bloom"),
    "codegen": Architecture("CodeGen", {"n_inner": 48, "rotary_dim": 8}),
    "cohere": Architecture("Cohere"),
    "cohere2": Architecture("Cohere2"),
    "ctrl": Architecture("CTRL", {"dff": 48}, model="CTRLLMHeadModel"),
    "diffllama": Architecture("DiffLlama"),
    "ernie4_5": Architecture("Ernie4_5"),
    "exaone4": Architecture("Exaone4"),
    # FalconLinear, an nn.Linear with a forward function of its own.
    "falcon_7b": Architecture("Falcon", FALCON),
    "falcon_40b": Architecture("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_rw": Architecture(
        "Falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "gemma": Architecture("Gemma"),
    "gemma2": Architecture("Gemma2"),
    "gemma3": Architecture("Gemma3Text", model="Gemma3ForCausalLM"),
    "glm": Architecture("Glm"),
    "glm4": Architecture("Glm4"),
    "gpt_bigcode": Architecture("GPTBigCode", {"n_inner": 48}),
    "gpt_neo": Architecture("GPTNeo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": Architecture("GPTNeoX"),
    "gptj": Architecture("GPTJ", {"n_inner": 48, "rotary_dim": 8}),
    "granite": Architecture("Granite"),
    "helium": Architecture("Helium"),
    "hunyuan": Architecture("HunYuanDenseV1"),
    "jais2": Architecture("Jais2"),
    "llama": Architecture("Llama"),
    "minicpm3": Architecture("MiniCPM3", LATENT),
    "ministral": Architecture("Ministral"),
    "mistral": Architecture("Mistral"),
    "modernbert_decoder": Architecture("ModernBertDecoder"),
    "mpt": Architecture("Mpt"),
    "nanochat": Architecture("NanoChat"),
    "nemotron": Architecture("Nemotron"),
    "olmo": Architecture("Olmo"),
    "olmo2": Architecture("Olmo2"),
    "olmo3": Architecture("Olmo3"),
    "opt": Architecture("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    # Two more linears around the blocks, and the norms behind the sublayers.
    "opt_350m": Architecture("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "persimmon": Architecture("Persimmon"),
    "phi": Architecture("Phi", MULTI_HEAD),
    "phi3": Architecture("Phi3"),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3"),
    "seed_oss": Architecture("SeedOss"),
    "smollm3": Architecture("SmolLM3"),
    "stablelm": Architecture("StableLm"),
    "starcoder2": Architecture("Starcoder2"),
    "vaultgemma": Architecture("VaultGemma"),
    "xglm": Architecture("XGLM", {"ffn_dim": 48}),
    "youtu": Architecture("Youtu", LATENT),
}

# Experts as parameters of three dimensions: nothing to prune for the pruner, and the tuner adapts the rest.
FUSED_EXPERTS = {
    "aria": Architecture("AriaText", EXPERTS | {"moe_num_experts": 4}, pruner_refuses=r"layers\.0\.mlp"),
    "dbrx": Architecture(
        "Dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "hidden_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "max_position_embeddings": None,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
        pruner_refuses=r"blocks\.0\.ffn",
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3",
        LATENT
        | EXPERTS
        | {
            "n_routed_experts": 4,
            "num_local_experts": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
        pruner_refuses=r"layers\.1\.mlp",
    ),
    "gpt_oss": Architecture("GptOss", EXPERTS, pruner_refuses=r"layers\.0\.mlp"),
    "granite_moe": Architecture("GraniteMoe", EXPERTS, pruner_refuses=r"layers\.0\.block_sparse_moe"),
    "jetmoe": Architecture("JetMoe", EXPERTS | {"kv_channels": 8}, pruner_refuses=r"layers\.0\."),
    "mixtral": Architecture("Mixtral", EXPERTS, pruner_refuses=r"layers\.0\.mlp"),
    "olmoe": Architecture("Olmoe", EXPERTS, pruner_refuses=r"layers\.0\.mlp"),
    "qwen3_moe": Architecture("Qwen3Moe", EXPERTS, pruner_refuses=r"layers\.0\.mlp"),
    # One output: no rank but 1 fits.
    "qwen2_moe": Architecture(
        "Qwen2Moe",
        EXPERTS,
        pruner_refuses=r"layers\.0\.mlp",
        tuner_refuses=r"layers\.0\.mlp\.shared_expert_gate",
        exclude=r".*\.shared_expert_gate",
    ),
    # Routers that are linear layers by class and return scores and choices.
    "llama4": Architecture(
        "Llama4Text",
        EXPERTS | {"intermediate_size_mlp": 48},
        model="Llama4ForCausalLM",
        pruner_refuses=r"layers\.0\.feed_forward",
        tuner_refuses=r"layers\.0\.feed_forward\.router",
        exclude=r".*\.router",
    ),
    "phimoe": Architecture(
        "Phimoe",
        EXPERTS,
        pruner_refuses=r"layers\.0\.mlp",
        tuner_refuses=r"layers\.0\.mlp\.router",
        exclude=r".*\.router",
    ),
}

# Convolutions and states in the blocks, and linears whose weight the block reads itself.
STATE_SPACES = {
    "bamba": Architecture(
        "Bamba",
        STATES | {"attn_layer_indices": [1]},
        pruner_refuses=r"layers\.0\.mamba",
        tuner_refuses=r"layers\.0\.mamba\.out_proj",
        exclude=r".*\.mamba\.out_proj",
    ),
    "falcon_h1": Architecture(
        "FalconH1",
        STATES | {"mamba_d_ssm": 64},
        pruner_refuses=r"layers\.0\.mamba",
        tuner_refuses=r"layers\.0\.mamba\.out_proj",
        exclude=r".*\.mamba\.out_proj",
    ),
    "falcon_mamba": Architecture(
        "FalconMamba",
        {"state_size": 8},
        pruner_refuses=r"layers\.0\.mixer",
        tuner_refuses=r"layers\.0\.mixer\.(x|dt|out)_proj",
        exclude=r".*\.(x|dt|out)_proj",
    ),
    "jamba": Architecture(
        "Jamba",
        EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        pruner_refuses=r"layers\.\d\.(mamba|feed_forward)",
        tuner_refuses=r"layers\.0\.mamba\.dt_proj",
        exclude=r".*\.dt_proj",
    ),
    "lfm2": Architecture("Lfm2", {"layer_types": ["conv", "full_attention"]}, pruner_refuses=r"layers\.0\.conv"),
    "mamba": Architecture(
        "Mamba",
        {"state_size": 8, "time_step_rank": 4},
        pruner_refuses=r"layers\.0\.mixer",
        tuner_refuses=r"layers\.0\.mixer\.(x|dt|out)_proj",
        exclude=r".*\.(x|dt|out)_proj",
    ),
    "mamba2": Architecture(
        "Mamba2",
        {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
        pruner_refuses=r"layers\.0\.mixer",
        tuner_refuses=r"layers\.0\.mixer\.out_proj",
        exclude=r".*\.out_proj",
    ),
    "nemotron_h": Architecture(
        "NemotronH",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
        },
        pruner_refuses=r"layers\.0\.mixer",
        tuner_refuses=r"layers\.0\.mixer\.out_proj",
        exclude=r".*\.0\.mixer\.out_proj",
    ),
    "qwen3_5": Architecture(
        "Qwen3_5Text",
        DELTA_NET | RECURRENT_FIRST,
        model="Qwen3_5ForCausalLM",
        pruner_refuses=r"layers\.0\.linear_attn",
    ),
    "qwen3_next": Architecture(
        "Qwen3Next",
        EXPERTS | DELTA_NET | RECURRENT_FIRST,
        pruner_refuses=r"layers\.0\.",
        tuner_refuses=r"layers\.0\.mlp\.shared_expert_gate",
        exclude=r".*\.shared_expert_gate",
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemma",
        {"block_types": ["recurrent", "attention"]},
        pruner_refuses=r"layers\.0\.temporal_block",
    ),
    "zamba": Architecture(
        "Zamba",
        SHARED_TRANSFORMER | {"head_dim": 16, "mamba_d_state": 8},
        pruner_refuses=r"layers\.0\.mamba",
        tuner_refuses=r"layers\.\d\.shared_transf",
        exclude=r".*\.shared_transf\..*",
    ),
    "zamba2": Architecture(
        "Zamba2",
        SHARED_TRANSFORMER | {"head_dim": 16, "mamba_d_state": 8, "n_mamba_heads": 4, "adapter_rank": 8},
        pruner_refuses=r"layers\.0\.mamba",
        tuner_refuses=r"layers\.\d\.(shared_transformer|mamba\.out_proj)",
        exclude=r".*(\.shared_transformer\..*|\.mamba\.out_proj)",
    ),
}

OTHERS = {
    # Clamps the weight of one layer and multiplies with the clamped weight of another, in training.
    "gemma3n": Architecture(
        "Gemma3nText",
        {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "laurel_rank": 4,
        },
        model="Gemma3nForCausalLM",
        tuner_refuses=r"layers\.0\.altup\.(correction|prediction)_coefs",
        exclude=r".*_coefs",
    ),
    # Conv1D: a matrix that lies the other way round.
    "gpt2": Architecture(
        "GPT2",
        {"n_inner": 48},
        model="GPT2LMHeadModel",
        pruner_refuses=r"h\.0\.\w+\.c_\w+",
        tuner_refuses=r"h\.0\.\w+\.c_\w+",
    ),
    "openai_gpt": Architecture(
        "OpenAIGPT",
        model="OpenAIGPTLMHeadModel",
        pruner_refuses=r"h\.0\.\w+\.c_\w+",
        tuner_refuses=r"h\.0\.\w+\.c_\w+",
    ),
    # Rescales two layers of each block in place when it goes from training to evaluation.
    "rwkv": Architecture(
        "Rwkv",
        tuner_refuses=r"blocks\.0\.(attention\.output|feed_forward\.value)",
        exclude=r".*\.(attention\.output|feed_forward\.value)",
    ),
}

ARCHITECTURES = {
    name: architecture
    for name, architecture in (WORK | FUSED_EXPERTS | STATE_SPACES | OTHERS).items()
    if architecture.exists
}
