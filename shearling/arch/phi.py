"""Phi-1, 1.5 and 2: LayerNorm, biases everywhere, attention and feed-forward beside each other, partial rotary positions."""

from shearling.axes.spec import Family, Normalisation

PHI = Family(
    name="Phi",
    model_types=("phi",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden                                          bias=always
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*head_dim  hidden                  bias=always
    read   model.layers.*.self_attn.k_proj.weight             kv_head*head_dim        hidden                  bias=always
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=always
    write  model.layers.*.self_attn.dense.weight              hidden                  kv_head*group*head_dim  bias=always
    feed_forward
    read   model.layers.*.mlp.fc1.weight                      intermediate            hidden                  bias=always
    write  model.layers.*.mlp.fc2.weight                      hidden                  intermediate            bias=always
    head
    norm   model.final_layernorm.weight                       hidden                                          bias=always
    head   lm_head.weight                                     vocab                   hidden                  bias=always  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="eps", eps_key="layer_norm_eps", centred=True),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "head_dim": "hidden_size / num_attention_heads",
        "num_key_value_heads": "num_attention_heads",
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
    },
)
