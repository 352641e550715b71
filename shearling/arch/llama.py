"""Llama 1-3, and all that declare its type: SmolLM 1-2, TinyLlama, Sheared-LLaMA."""

from shearling.axes.spec import Family, Normalisation

LLAMA = Family(
    name="Llama",
    model_types=("llama",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden                  bias=attention_bias
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden                  bias=attention_bias
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim  bias=attention_bias
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
        "num_key_value_heads": "num_attention_heads",
        "head_dim": "hidden_size / num_attention_heads",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    },
    divides=("hidden_size % num_attention_heads",),
)
