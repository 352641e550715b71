"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): a Qwen2 with experts and a shared one beside them."""

from shearling.axes.spec import Family, LayerRule, Normalisation

QWEN2_MOE = Family(
    name="Qwen2-MoE",
    model_types=("qwen2_moe",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden                  bias=qkv_bias
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden                  bias=qkv_bias
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=qkv_bias
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    read   model.layers.*.mlp.gate_proj.weight                intermediate            hidden                  on=dense
    read   model.layers.*.mlp.up_proj.weight                  intermediate            hidden                  on=dense
    write  model.layers.*.mlp.down_proj.weight                hidden                  intermediate            on=dense
    experts
    route  model.layers.*.mlp.gate.weight                     expert                  hidden                  on=sparse
    read   model.layers.*.mlp.experts.gate_up_proj            expert  2*moe_intermediate  hidden              on=sparse  disk=model.layers.*.mlp.experts.#.gate_proj.weight+model.layers.*.mlp.experts.#.up_proj.weight
    write  model.layers.*.mlp.experts.down_proj               expert  hidden  moe_intermediate                on=sparse  disk=model.layers.*.mlp.experts.#.down_proj.weight
    read   model.layers.*.mlp.shared_expert_gate.weight       1                       hidden                  on=sparse
    read   model.layers.*.mlp.shared_expert.gate_proj.weight  shared_intermediate     hidden                  on=sparse
    read   model.layers.*.mlp.shared_expert.up_proj.weight    shared_intermediate     hidden                  on=sparse
    write  model.layers.*.mlp.shared_expert.down_proj.weight  hidden                  shared_intermediate     on=sparse
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    fixed={"top_k": "num_experts_per_tok"},
    defaults={
        "num_key_value_heads": 16,
        "head_dim": "hidden_size / num_attention_heads",
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    },
    nulls={"num_key_value_heads": "num_attention_heads"},
    layer_rules=(
        LayerRule("mlp_only_layers", at="every decoder_sparse_step", then="sparse", otherwise="dense", lists="dense"),
        LayerRule("layer_types"),
    ),
    uncut={"layer if use_sliding_window": "its class may give layers their windows by number"},
)
