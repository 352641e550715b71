"""GPT-2: LayerNorm, biases, learned positions, weights stored as [in, out]; heads * head_dim is hidden in the code."""

from shearling.axes.spec import Family, Normalisation

GPT2 = Family(
    name="GPT-2",
    model_types=("gpt2",),
    table="""
    embedding
    embed  transformer.wte.weight                  vocab              hidden
    embed  transformer.wpe.weight                  positions          hidden
    attention
    norm   transformer.h.*.ln_1.weight             hidden                                 bias=always
    read   transformer.h.*.attn.c_attn.weight      hidden             3*kv_head*head_dim  bias=always
    write  transformer.h.*.attn.c_proj.weight      kv_head*head_dim   hidden              bias=always
    feed_forward
    norm   transformer.h.*.ln_2.weight             hidden                                 bias=always
    read   transformer.h.*.mlp.c_fc.weight         hidden             intermediate        bias=always
    write  transformer.h.*.mlp.c_proj.weight       intermediate       hidden              bias=always
    head
    norm   transformer.ln_f.weight                 hidden                                 bias=always
    head   lm_head.weight                          vocab              hidden              tied=transformer.wte.weight
    """,
    norms=Normalisation(eps_attribute="eps", eps_key="layer_norm_epsilon", centred=True),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*head_dim",
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    },
    fixed={"positions": "n_positions"},
    defaults={
        "n_inner": "4 * n_embd",
        "head_dim": "n_embd / n_head",
        "n_positions": 1024,
        "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    coupled=("hidden_size == num_attention_heads * head_dim",),
    uncut={
        "layer if scale_attn_by_inverse_layer_idx": "each layer's attention is scaled by the layer's number, which a "
        "config can't hold for the layers that stay"
    },
)
