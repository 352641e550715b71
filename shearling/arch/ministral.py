"""Ministral: a Mistral whose layers may differ in their windows; Ministral 3: one window, queries scaled by position."""

from shearling.axes.spec import Family, LayerRule, Normalisation

MINISTRAL = Family(
    name="Ministral",
    model_types=("ministral",),
    table="""
    embedding
    embed  model.embed_tokens.weight                               vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight                   hidden
    read   model.layers.*.self_attn.q_proj.weight                  kv_head*group*rotary    hidden
    read   model.layers.*.self_attn.k_proj.weight                  kv_head*rotary          hidden
    read   model.layers.*.self_attn.v_proj.weight                  kv_head*head_dim        hidden
    write  model.layers.*.self_attn.o_proj.weight                  hidden                  kv_head*group*head_dim
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight          hidden
    read   model.layers.*.mlp.gate_proj.weight                     intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                       intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                     hidden                  intermediate
    head
    norm   model.norm.weight                                       hidden
    head   lm_head.weight                                          vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": "hidden_size / num_attention_heads",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    },
    nulls={"num_key_value_heads": "num_attention_heads"},
    layer_rules=(LayerRule("layer_types"),),
)

MINISTRAL3 = Family(
    name="Ministral 3",
    model_types=("ministral3",),
    table="""
    embedding
    embed  model.embed_tokens.weight                               vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight                   hidden
    read   model.layers.*.self_attn.q_proj.weight                  kv_head*group*rotary    hidden
    read   model.layers.*.self_attn.k_proj.weight                  kv_head*rotary          hidden
    read   model.layers.*.self_attn.v_proj.weight                  kv_head*head_dim        hidden
    write  model.layers.*.self_attn.o_proj.weight                  hidden                  kv_head*group*head_dim
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight          hidden
    read   model.layers.*.mlp.gate_proj.weight                     intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                       intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                     hidden                  intermediate
    head
    norm   model.norm.weight                                       hidden
    head   lm_head.weight                                          vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    nulls={"num_key_value_heads": "num_attention_heads", "head_dim": "hidden_size / num_attention_heads"},
)
