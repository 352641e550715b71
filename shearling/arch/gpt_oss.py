"""gpt-oss: experts stored transposed, gate and up entry by entry, biases everywhere, a sink for each head."""

from shearling.axes.spec import Family, LayerRule, Normalisation

GPT_OSS = Family(
    name="gpt-oss",
    model_types=("gpt_oss",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*rotary    hidden                  bias=attention_bias
    read   model.layers.*.self_attn.k_proj.weight             kv_head*rotary          hidden                  bias=attention_bias
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  bias=attention_bias
    inner  model.layers.*.self_attn.sinks                     kv_head*group
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim  bias=attention_bias
    experts
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    route  model.layers.*.mlp.router.weight                   expert                  hidden                  bias=always
    read   model.layers.*.mlp.experts.gate_up_proj            expert  hidden  moe_intermediate*2              bias=always
    write  model.layers.*.mlp.experts.down_proj               expert  moe_intermediate  hidden                bias=always
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=Normalisation(eps_attribute="variance_epsilon", eps_key="rms_norm_eps"),
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    names={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
    fixed={"top_k": "num_experts_per_tok"},
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    nulls={"num_key_value_heads": "num_attention_heads", "head_dim": "hidden_size / num_attention_heads"},
    layer_rules=(LayerRule("layer_types", at="every 2", then="full_attention", otherwise="sliding_attention"),),
)
