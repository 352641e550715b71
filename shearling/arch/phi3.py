"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another."""

from shearling.axes.spec import Family, Normalisation

PHI3 = Family(
    name="Phi-3",
    model_types=("phi3",),
    table="""
    embedding
    embed  model.embed_tokens.weight                               vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight                   hidden
    read   model.layers.*.self_attn.qkv_proj.weight                kv_head*group*rotary+kv_head*rotary+kv_head*head_dim  hidden
    write  model.layers.*.self_attn.o_proj.weight                  hidden                  kv_head*group*head_dim
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight          hidden
    read   model.layers.*.mlp.gate_up_proj.weight                  2*intermediate          hidden
    write  model.layers.*.mlp.down_proj.weight                     hidden                  intermediate
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
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
)
