"""Qwen3-Next: three layers of linear attention to one of gated attention; experts and a shared one beside them."""

from shearling.axes.spec import Family, LayerRule, Normalisation

# The linear attention stays whole: its inner sizes are no axes.
LINEAR = {
    "linear_key": "linear_num_key_heads * linear_key_head_dim",
    "linear_value": "linear_num_value_heads * linear_value_head_dim",
    "linear_heads": "linear_num_value_heads",
    "linear_head_dim": "linear_value_head_dim",
    "linear_kernel": "linear_conv_kernel_dim",
}
NORMS = Normalisation(eps_attribute="eps", eps_key="rms_norm_eps", offset=1.0)
DEFAULTS = {
    "head_dim": 256,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "rms_norm_eps": 1e-6,
}
ATTENTION = LayerRule(
    "layer_types", at="every full_attention_interval", then="full_attention", otherwise="linear_attention"
)

QWEN3_NEXT = Family(
    name="Qwen3-Next",
    model_types=("qwen3_next",),
    table="""
    embedding
    embed  model.embed_tokens.weight                          vocab                   hidden
    attention
    norm   model.layers.*.input_layernorm.weight              hidden
    read   model.layers.*.self_attn.q_proj.weight             kv_head*group*2*head_dim  hidden                on=full_attention  bias=attention_bias
    norm   model.layers.*.self_attn.q_norm.weight             head_dim                                        on=full_attention
    read   model.layers.*.self_attn.k_proj.weight             kv_head*head_dim        hidden                  on=full_attention  bias=attention_bias
    norm   model.layers.*.self_attn.k_norm.weight             head_dim                                        on=full_attention
    read   model.layers.*.self_attn.v_proj.weight             kv_head*head_dim        hidden                  on=full_attention  bias=attention_bias
    write  model.layers.*.self_attn.o_proj.weight             hidden                  kv_head*group*head_dim  on=full_attention  bias=attention_bias
    linear_attention
    read   model.layers.*.linear_attn.in_proj_qkvz.weight     2*linear_key+2*linear_value  hidden             on=linear_attention
    read   model.layers.*.linear_attn.in_proj_ba.weight       2*linear_heads          hidden                  on=linear_attention
    inner  model.layers.*.linear_attn.conv1d.weight           2*linear_key+linear_value  1  linear_kernel     on=linear_attention
    inner  model.layers.*.linear_attn.dt_bias                 linear_heads                                    on=linear_attention
    inner  model.layers.*.linear_attn.A_log                   linear_heads                                    on=linear_attention
    inner  model.layers.*.linear_attn.norm.weight             linear_head_dim                                 on=linear_attention
    write  model.layers.*.linear_attn.out_proj.weight         hidden                  linear_value            on=linear_attention
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    read   model.layers.*.mlp.gate_proj.weight                intermediate            hidden                  on=dense
    read   model.layers.*.mlp.up_proj.weight                  intermediate            hidden                  on=dense
    write  model.layers.*.mlp.down_proj.weight                hidden                  intermediate            on=dense
    experts
    route  model.layers.*.mlp.gate.weight                     expert                  hidden                  on=sparse
    read   model.layers.*.mlp.experts.gate_up_proj            expert  2*moe_intermediate  hidden              on=sparse  disk=model.layers.*.mlp.experts.#.gate_proj.weight+model.layers.*.mlp.experts.#.up_proj.weight
    write  model.layers.*.mlp.experts.down_proj               expert  hidden  moe_intermediate                on=sparse  disk=model.layers.*.mlp.experts.#.down_proj.weight
    read   model.layers.*.mlp.shared_expert_gate.weight       1                       hidden                  on=sparse
    read   model.layers.*.mlp.shared_expert.gate_proj.weight  shared_intermediate     hidden                  on=sparse
    read   model.layers.*.mlp.shared_expert.up_proj.weight    shared_intermediate     hidden                  on=sparse
    write  model.layers.*.mlp.shared_expert.down_proj.weight  hidden                  shared_intermediate     on=sparse
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=NORMS,
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    attends="full_attention",
    fixed={**LINEAR, "top_k": "num_experts_per_tok"},
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 2,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.001,
    },
    nulls={"num_key_value_heads": "num_attention_heads"},
    layer_rules=(
        ATTENTION,
        LayerRule("mlp_only_layers", at="every decoder_sparse_step", then="sparse", otherwise="dense", lists="dense"),
    ),
)
