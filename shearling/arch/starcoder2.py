"""StarCoder2: a grouped-query model with LayerNorm and biases."""

from shearling.axes.spec import Family, Normalisation

STARCODER2 = Family(
    name="StarCoder2",
    model_types=("starcoder2",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden                                          bias=always
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden                  bias=use_bias
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden                  bias=use_bias
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=use_bias
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim  bias=use_bias
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight     hidden                                          bias=always
    read   model.layers.*.mlp.c_fc.weight                     intermediate            hidden                  bias=use_bias
    write  model.layers.*.mlp.c_proj.weight                   hidden                  intermediate            bias=use_bias
    head
    norm   model.norm.weight                                  hidden                                          bias=always
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="eps", eps_key="norm_epsilon", centred=True),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": "hidden_size / num_attention_heads",
        "use_bias": True,
        "tie_word_embeddings": True,
        "norm_epsilon": 1e-5,
    },
)
