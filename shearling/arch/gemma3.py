"""Gemma 3's text model: a Gemma 2 with norms on each head's q and k, five local layers to a global one."""

from shearling.axes.spec import Family, LayerRule, Normalisation

GEMMA3 = Family(
    name="Gemma 3",
    model_types=("gemma3_text",),
    table="""
    embedding
    embed  model.embed_tokens.weight                               vocab                   hidden                  scaled=hidden
    attention
    norm   model.layers.*.input_layernorm.weight                   hidden
    read   model.layers.*.self_attn.q_proj.weight                  kv_head*group*rotary    hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.q_norm.weight                  rotary
    read   model.layers.*.self_attn.k_proj.weight                  kv_head*rotary          hidden                  bias=attention_bias
    norm   model.layers.*.self_attn.k_norm.weight                  rotary
    read   model.layers.*.self_attn.v_proj.weight                  kv_head*head_dim        hidden                  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight                  hidden                  kv_head*group*head_dim  bias=attention_bias
    post   model.layers.*.post_attention_layernorm.weight          hidden
    feed_forward
    norm   model.layers.*.pre_feedforward_layernorm.weight         hidden
    read   model.layers.*.mlp.gate_proj.weight                     intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                       intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                     hidden                  intermediate
    post   model.layers.*.post_feedforward_layernorm.weight        hidden
    head
    norm   model.norm.weight                                       hidden
    head   lm_head.weight                                          vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="eps", eps_key="rms_norm_eps", offset=1.0),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    attention_scale="query_pre_attn_scalar",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "rms_norm_eps": 1e-6,
    },
    divides=("hidden_size % num_attention_heads",),
    layer_rules=(
        LayerRule(
            "layer_types", at="every sliding_window_pattern", then="full_attention", otherwise="sliding_attention"
        ),
    ),
    logits={"cap": "final_logit_softcapping"},
)
