"""Gemma 1 and 2: embeddings scaled by sqrt(hidden), norms that store their weight less 1; Gemma 2: norms after, soft caps."""

from shearling.axes.spec import Family, LayerRule, Normalisation

GEMMA_NORM = Normalisation(eps_attribute="eps", eps_key="rms_norm_eps", offset=1.0)

GEMMA = Family(
    name="Gemma",
    model_types=("gemma",),
    table="""
    embedding
    embed  model.embed_tokens.weight                               vocab                   hidden                  scaled=hidden
    attention
    norm   model.layers.*.input_layernorm.weight                   hidden
    read   model.layers.*.self_attn.q_proj.weight                  kv_head*group*rotary    hidden                  bias=attention_bias
    read   model.layers.*.self_attn.k_proj.weight                  kv_head*rotary          hidden                  bias=attention_bias
    read   model.layers.*.self_attn.v_proj.weight                  kv_head*head_dim        hidden                  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight                  hidden                  kv_head*group*head_dim  bias=attention_bias
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight          hidden
    read   model.layers.*.mlp.gate_proj.weight                     intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                       intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                     hidden                  intermediate
    head
    norm   model.norm.weight                                       hidden
    head   lm_head.weight                                          vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=GEMMA_NORM,
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": 16,
        "head_dim": 256,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    },
)

GEMMA2 = Family(
    name="Gemma 2",
    model_types=("gemma2",),
    table="""
    embedding
    embed  model.embed_tokens.weight                               vocab                   hidden                  scaled=hidden
    attention
    norm   model.layers.*.input_layernorm.weight                   hidden
    read   model.layers.*.self_attn.q_proj.weight                  kv_head*group*rotary    hidden                  bias=attention_bias
    read   model.layers.*.self_attn.k_proj.weight                  kv_head*rotary          hidden                  bias=attention_bias
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
    norms=GEMMA_NORM,
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    attention_scale="query_pre_attn_scalar",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
    },
    nulls={"final_logit_softcapping": None},
    divides=("hidden_size % num_attention_heads",),
    layer_rules=(LayerRule("layer_types", at="every 2", then="full_attention", otherwise="sliding_attention"),),
    logits={"cap": "final_logit_softcapping"},
)
