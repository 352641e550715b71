"""Seed-OSS: a Llama with biases on q, k and v, and a head_dim of its own."""

from shearling.axes.spec import Family, Normalisation

SEED_OSS = Family(
    name="Seed-OSS",
    model_types=("seed_oss",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden                  bias=attention_bias
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden                  bias=attention_bias
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim  bias=attention_out_bias
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    read   model.layers.*.mlp.gate_proj.weight                intermediate            hidden                  bias=mlp_bias
    read   model.layers.*.mlp.up_proj.weight                  intermediate            hidden                  bias=mlp_bias
    write  model.layers.*.mlp.down_proj.weight                hidden                  intermediate            bias=mlp_bias
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    },
)
