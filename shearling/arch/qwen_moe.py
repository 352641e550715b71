"""Qwen3-MoE: a Qwen3 with experts, or with a dense feed-forward on the layers that its config lists."""

from shearling.axes.spec import Family, LayerRule, Normalisation

QWEN3_MOE = Family(
    name="Qwen3-MoE",
    model_types=("qwen3_moe",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.q_norm.weight             rotary
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.k_norm.weight             rotary
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim  bias=attention_bias
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    read   model.layers.*.mlp.gate_proj.weight                intermediate            hidden                  on=dense
    read   model.layers.*.mlp.up_proj.weight                  intermediate            hidden                  on=dense
    write  model.layers.*.mlp.down_proj.weight                hidden                  intermediate            on=dense
    experts
    route  model.layers.*.mlp.gate.weight                     expert                  hidden                  on=sparse
    read   model.layers.*.mlp.experts.gate_up_proj            expert  2*moe_intermediate  hidden              on=sparse  disk=model.layers.*.mlp.experts.#.gate_proj.weight+model.layers.*.mlp.experts.#.up_proj.weight
    write  model.layers.*.mlp.experts.down_proj               expert  hidden  moe_intermediate                on=sparse  disk=model.layers.*.mlp.experts.#.down_proj.weight
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    names={"num_experts": "num_local_experts"},  # since transformers 5.24; published configs have the other
    fixed={"top_k": "num_experts_per_tok"},
    defaults={
        "num_key_value_heads": 4,
        "head_dim": "hidden_size / num_attention_heads",
        "attention_bias": False,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    },
    nulls={"num_key_value_heads": "num_attention_heads"},
    layer_rules=(
        LayerRule("mlp_only_layers", at="every decoder_sparse_step", then="sparse", otherwise="dense", lists="dense"),
    ),
)
