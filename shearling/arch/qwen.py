"""Qwen2 and 2.5: biases on q, k and v. Qwen3: norms on each head's q and k instead, and a head_dim of its own."""

from shearling.axes.spec import Family, LayerRule, Normalisation

RMS = Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps")

# The upper layers attend through a sliding window, if any do.
WINDOWS = LayerRule(
    "layer_types",
    at="from max_window_layers",
    then="sliding_attention",
    otherwise="full_attention",
    needs=("use_sliding_window", "sliding_window"),
)

QWEN2 = Family(
    name="Qwen2",
    model_types=("qwen2",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden                  bias=always
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden                  bias=always
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=always
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    read   model.layers.*.mlp.gate_proj.weight                intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                  intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                hidden                  intermediate
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=RMS,
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": "hidden_size / num_attention_heads",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
    },
    nulls={"num_key_value_heads": "num_attention_heads", "sliding_window": None},
    layer_rules=(WINDOWS,),
)

QWEN3 = Family(
    name="Qwen3",
    model_types=("qwen3",),
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
    read   model.layers.*.mlp.gate_proj.weight                intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                  intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                hidden                  intermediate
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=RMS,
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
    },
    nulls={"num_key_value_heads": "num_attention_heads", "sliding_window": None},
    layer_rules=(WINDOWS,),
)
