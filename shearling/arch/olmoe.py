"""OLMoE: experts, and norms over all of a layer's q and k heads; its code ties hidden to heads * head_dim."""

from shearling.axes.spec import Family, Normalisation

OLMOE = Family(
    name="OLMoE",
    model_types=("olmoe",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*head_dim  hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.q_norm.weight             kv_head*group*head_dim
    read   model.layers.*.self_attn.k_proj.weight             kv_head*head_dim        hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.k_norm.weight             kv_head*head_dim
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim  bias=attention_bias
    experts
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    route  model.layers.*.mlp.gate.weight                     expert                  hidden
    read   model.layers.*.mlp.experts.gate_up_proj            expert  2*moe_intermediate  hidden  disk=model.layers.*.mlp.experts.#.gate_proj.weight+model.layers.*.mlp.experts.#.up_proj.weight
    write  model.layers.*.mlp.experts.down_proj               expert  hidden  moe_intermediate    disk=model.layers.*.mlp.experts.#.down_proj.weight
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    names={"moe_intermediate_size": "intermediate_size"},
    fixed={"top_k": "num_experts_per_tok"},
    defaults={
        "num_key_value_heads": "num_attention_heads",
        "head_dim": "hidden_size / num_attention_heads",
        "attention_bias": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    coupled=("hidden_size == num_attention_heads * head_dim",),
)
