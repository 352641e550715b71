"""Mixtral: a Mistral whose feed-forward is a choice of experts; in files each expert's matrices lie apart."""

from shearling.axes.spec import Family, Normalisation

MIXTRAL = Family(
    name="Mixtral",
    model_types=("mixtral",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim
    experts
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    route  model.layers.*.mlp.gate.weight                     expert                  hidden                              disk=model.layers.*.block_sparse_moe.gate.weight
    read   model.layers.*.mlp.experts.gate_up_proj            expert                  2*moe_intermediate      hidden      disk=model.layers.*.block_sparse_moe.experts.#.w1.weight+model.layers.*.block_sparse_moe.experts.#.w3.weight
    write  model.layers.*.mlp.experts.down_proj               expert                  hidden        moe_intermediate      disk=model.layers.*.block_sparse_moe.experts.#.w2.weight
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    names={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
    fixed={"top_k": "num_experts_per_tok"},
    defaults={
        "num_key_value_heads": 8,
        "head_dim": "hidden_size / num_attention_heads",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    nulls={"num_key_value_heads": "num_attention_heads"},
)
