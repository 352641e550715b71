"""Qwen3.5: the hybrid of Qwen3-Next with the linear attention's projections apart."""

from shearling.arch.qwen_next import ATTENTION, DEFAULTS, LINEAR, NORMS
from shearling.axes.spec import Family

QWEN3_5 = Family(
    name="Qwen3.5",
    model_types=("qwen3_5_text",),
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
    read   model.layers.*.linear_attn.in_proj_qkv.weight      2*linear_key+linear_value  hidden               on=linear_attention
    read   model.layers.*.linear_attn.in_proj_z.weight        linear_value            hidden                  on=linear_attention
    read   model.layers.*.linear_attn.in_proj_b.weight        linear_heads            hidden                  on=linear_attention
    read   model.layers.*.linear_attn.in_proj_a.weight        linear_heads            hidden                  on=linear_attention
    inner  model.layers.*.linear_attn.conv1d.weight           2*linear_key+linear_value  1  linear_kernel     on=linear_attention
    inner  model.layers.*.linear_attn.dt_bias                 linear_heads                                    on=linear_attention
    inner  model.layers.*.linear_attn.A_log                   linear_heads                                    on=linear_attention
    inner  model.layers.*.linear_attn.norm.weight             linear_head_dim                                 on=linear_attention
    write  model.layers.*.linear_attn.out_proj.weight         hidden                  linear_value            on=linear_attention
    feed_forward
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    read   model.layers.*.mlp.gate_proj.weight                intermediate            hidden
    read   model.layers.*.mlp.up_proj.weight                  intermediate            hidden
    write  model.layers.*.mlp.down_proj.weight                hidden                  intermediate
    head
    norm   model.norm.weight                                  hidden
    head   lm_head.weight                                     vocab                   hidden                  tied=model.embed_tokens.weight
    """,
    norms=NORMS,
    cache="2*kv_head*head_dim",
    scores="2*kv_head*group*head_dim",
    attends="full_attention",
    fixed=LINEAR,
    defaults={**DEFAULTS, "num_key_value_heads": 4},
    nulls={"num_key_value_heads": "num_attention_heads"},
    layer_rules=(ATTENTION,),
)


QWEN3_5_MOE = Family(
    name="Qwen3.5-MoE",
    model_types=("qwen3_5_moe_text",),
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
    read   model.layers.*.linear_attn.in_proj_qkv.weight      2*linear_key+linear_value  hidden               on=linear_attention
    read   model.layers.*.linear_attn.in_proj_z.weight        linear_value            hidden                  on=linear_attention
    read   model.layers.*.linear_attn.in_proj_b.weight        linear_heads            hidden                  on=linear_attention
    read   model.layers.*.linear_attn.in_proj_a.weight        linear_heads            hidden                  on=linear_attention
    inner  model.layers.*.linear_attn.conv1d.weight           2*linear_key+linear_value  1  linear_kernel     on=linear_attention
    inner  model.layers.*.linear_attn.dt_bias                 linear_heads                                    on=linear_attention
    inner  model.layers.*.linear_attn.A_log                   linear_heads                                    on=linear_attention
    inner  model.layers.*.linear_attn.norm.weight             linear_head_dim                                 on=linear_attention
    write  model.layers.*.linear_attn.out_proj.weight         hidden                  linear_value            on=linear_attention
    experts
    norm   model.layers.*.post_attention_layernorm.weight     hidden
    route  model.layers.*.mlp.gate.weight                     expert                  hidden
    read   model.layers.*.mlp.experts.gate_up_proj            expert  2*moe_intermediate  hidden                disk=model.layers.*.mlp.experts.#.gate_proj.weight+model.layers.*.mlp.experts.#.up_proj.weight
    write  model.layers.*.mlp.experts.down_proj               expert  hidden  moe_intermediate                  disk=model.layers.*.mlp.experts.#.down_proj.weight
    read   model.layers.*.mlp.shared_expert_gate.weight       1                       hidden
    read   model.layers.*.mlp.shared_expert.gate_proj.weight  shared_intermediate     hidden
    read   model.layers.*.mlp.shared_expert.up_proj.weight    shared_intermediate     hidden
    write  model.layers.*.mlp.shared_expert.down_proj.weight  hidden                  shared_intermediate
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
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "router_aux_loss_coef": 0.001,
    },
    nulls={"num_key_value_heads": "num_attention_heads"},
    layer_rules=(ATTENTION,),
)
