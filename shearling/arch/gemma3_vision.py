"""Gemma 3 with its vision tower: the text model is sheared, and the connector's rows where hidden is cut."""

from dataclasses import replace

from shearling.arch.gemma3 import GEMMA3
from shearling.axes.spec import Inside

GEMMA3_VISION = replace(
    GEMMA3,
    name="Gemma 3 with vision",
    model_types=("gemma3",),
    fixed={"vision": "vision_config.hidden_size"},
    # Published configs of the text part leave sizes out.
    defaults={
        **GEMMA3.defaults,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "vocab_size": 262208,
        "vision_config.hidden_size": 768,
    },
    logits={},  # the whole's class has no cap
    inside=Inside(
        text_type="gemma3_text",
        connectors="""
        connector
        join  model.multi_modal_projector.mm_input_projection_weight  vision  hidden  disk=multi_modal_projector.mm_input_projection_weight
        """,
        carried=("vision_tower.", "multi_modal_projector.mm_soft_emb_norm."),
        module={"model.": "model.language_model."},
        disk={"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        refused={"text_config.final_logit_softcapping": "transformers' whole doesn't cap logits, its text model does"},
    ),
)
