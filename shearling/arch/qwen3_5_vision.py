"""Qwen3.5 with its vision tower: the text model is sheared, and the connector's rows where hidden is cut."""

from dataclasses import replace

from shearling.arch.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from shearling.axes.spec import Inside

VISION = Inside(
    text_type="qwen3_5_text",
    connectors="""
    connector
    join  model.visual.merger.linear_fc2.weight  hidden  merged  bias=always
    """,
    carried=("model.visual.",),
    module={"model.": "model.language_model."},
    disk={"model.": "model.language_model."},
    # Heads that predict further tokens: transformers' classes pass them over, and they have the source's sizes.
    dropped=("mtp.",),
    follows={"vision_config.out_hidden_size": "hidden_size"},
    refused={"vision_config.deepstack_visual_indexes": "transformers' class takes vision features in at the embedding"},
)
FIXED = {"merged": "vision_config.hidden_size * vision_config.spatial_merge_size * vision_config.spatial_merge_size"}
DEFAULTS = {
    "vision_config.hidden_size": 1152,
    "vision_config.out_hidden_size": 3584,
    "vision_config.spatial_merge_size": 2,
}

QWEN3_5_VISION = replace(
    QWEN3_5,
    name="Qwen3.5 with vision",
    model_types=("qwen3_5",),
    fixed={**QWEN3_5.fixed, **FIXED},
    defaults={**QWEN3_5.defaults, **DEFAULTS},
    inside=VISION,
)
QWEN3_5_MOE_VISION = replace(
    QWEN3_5_MOE,
    name="Qwen3.5-MoE with vision",
    model_types=("qwen3_5_moe",),
    fixed={**QWEN3_5_MOE.fixed, **FIXED},
    defaults={**QWEN3_5_MOE.defaults, **DEFAULTS},
    inside=replace(VISION, text_type="qwen3_5_moe_text"),
)
