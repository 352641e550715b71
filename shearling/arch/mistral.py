"""Mistral: a Llama without biases; one sliding window, if any, for all layers."""

from shearling.axes.spec import Family, Normalisation

MISTRAL = Family(
    name="Mistral",
    model_types=("mistral",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden
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
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": "hidden_size / num_attention_heads",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    },
)
