"""OLMo 2 and 3: norms after attention and feed-forward, not before, and over all heads of q and k; OLMo 3: local layers."""

from shearling.axes.spec import Family, LayerRule, Normalisation

OLMO2 = Family(
    name="OLMo 2",
    model_types=("olmo2",),
    table="""
    embedding
    embed  model.embed_tokens.weight                               vocab                   hidden
    attention
    read   model.layers.*.self_attn.q_proj.weight                  kv_head*group*rotary    hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.q_norm.weight                  kv_head*group*rotary
    read   model.layers.*.self_attn.k_proj.weight                  kv_head*rotary          hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.k_norm.weight                  kv_head*rotary
    read   model.layers.*.self_attn.v_proj.weight                  kv_head*head_dim        hidden                  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight                  hidden                  kv_head*group*head_dim  bias=attention_bias
    post   model.layers.*.post_attention_layernorm.weight          hidden
    feed_forward
    read   model.layers.*.mlp.gate_proj.weight                     intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                       intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                     hidden                  intermediate
    post   model.layers.*.post_feedforward_layernorm.weight        hidden
    head
    norm   model.norm.weight                                       hidden
    head   lm_head.weight                                          vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": "num_attention_heads",
        "head_dim": "hidden_size / num_attention_heads",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
)

OLMO3 = Family(
    name="OLMo 3",
    model_types=("olmo3",),
    table="""
    embedding
    embed  model.embed_tokens.weight                               vocab                   hidden
    attention
    read   model.layers.*.self_attn.q_proj.weight                  kv_head*group*rotary    hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.q_norm.weight                  kv_head*group*rotary
    read   model.layers.*.self_attn.k_proj.weight                  kv_head*rotary          hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.k_norm.weight                  kv_head*rotary
    read   model.layers.*.self_attn.v_proj.weight                  kv_head*head_dim        hidden                  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight                  hidden                  kv_head*group*head_dim  bias=attention_bias
    post   model.layers.*.post_attention_layernorm.weight          hidden
    feed_forward
    read   model.layers.*.mlp.gate_proj.weight                     intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                       intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                     hidden                  intermediate
    post   model.layers.*.post_feedforward_layernorm.weight        hidden
    head
    norm   model.norm.weight                                       hidden
    head   lm_head.weight                                          vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": "num_attention_heads",
        "head_dim": "hidden_size / num_attention_heads",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    layer_rules=(LayerRule("layer_types", at="every 4", then="full_attention", otherwise="sliding_attention"),),
)
