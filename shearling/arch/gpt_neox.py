"""GPT-NeoX and Pythia: LayerNorm, biases, q, k and v head by head in one matrix; heads * head_dim is hidden."""

from shearling.axes.spec import Family, Normalisation

GPT_NEOX = Family(
    name="GPT-NeoX",
    model_types=("gpt_neox",),
    table="""
    embedding
    embed  gpt_neox.embed_in.weight                            vocab               hidden
    attention
    norm   gpt_neox.layers.*.input_layernorm.weight            hidden                                bias=always
    read   gpt_neox.layers.*.attention.query_key_value.weight  kv_head*3*head_dim  hidden            bias=attention_bias
    write  gpt_neox.layers.*.attention.dense.weight            hidden              kv_head*head_dim  bias=attention_bias
    feed_forward
    norm   gpt_neox.layers.*.post_attention_layernorm.weight   hidden                                bias=always
    read   gpt_neox.layers.*.mlp.dense_h_to_4h.weight          intermediate        hidden            bias=always
    write  gpt_neox.layers.*.mlp.dense_4h_to_h.weight          hidden              intermediate      bias=always
    head
    norm   gpt_neox.final_layer_norm.weight                    hidden                                bias=always
    head   lm_head.weight                                      vocab               hidden            tied=gpt_neox.embed_in.weight disk=embed_out.weight
    """,
    norms=Normalisation(eps_attribute="eps", eps_key="layer_norm_eps", centred=True),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*head_dim",
    defaults={
        "head_dim": "hidden_size / num_attention_heads",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
    },
    coupled=("hidden_size == num_attention_heads * head_dim",),
)
