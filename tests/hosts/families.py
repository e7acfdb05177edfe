"""Tiny random models of transformers' MoE families."""

import deepspeed
import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ATTENTION = {"layer_types": ["full_attention"] * 2}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "moe_intermediate_size": 16}
FAMILIES = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 8},
    "flex_olmo": {"num_experts": 8},
    "deepseek_v2": {**LATENT, **GROUPS, "topk_method": "group_limited_greedy", "num_key_value_heads": 4},
    "deepseek_v3": {**LATENT, **GROUPS, "num_key_value_heads": 4, "routed_scaling_factor": 2.5},
    "glm4_moe": {**GROUPS, "head_dim": 8},
    "dots1": {
        **GROUPS,
        "head_dim": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        **ATTENTION,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8},
    "granitemoe": {"num_local_experts": 8},
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 8},
    "jamba": {
        "num_experts": 8,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "num_dense_layers": 0,
        **ATTENTION,
    },
    "minimax": {"num_local_experts": 8, "head_dim": 8, **ATTENTION},
    "minimax_m2": {"num_local_experts": 8, "head_dim": 8},
}


def skip_where_autoep_crashes(family):
    """With transformers 5.23, DeepSpeed's AutoEP fails for these families, at its output recorders."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    crashes = type(_CAN_RECORD_REGISTRY) is not dict and Version(deepspeed.__version__) <= Version("0.19.8")
    if crashes and family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        pytest.skip("AutoEP up to deepspeed 0.19.8 cannot take this family from transformers 5.23 on")


def tiny_model(family, seed=0, **changes):
    """A random model of that family, in evaluation mode."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # some routers start at zero
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.shape[0] == 8:
                parameter.normal_()
    return model.eval()
