"""Quantised checkpoints: which method made them, and how to get plain weights instead."""

from typing import Any

ORIGINAL = "get the upload that it was quantised from: its name without -GPTQ, -AWQ, -FP8, -bnb-4bit"
WHILE_LOADING = "from_pretrained(MODEL, quantization_config={}(dequantize=True)), then save_pretrained; or " + ORIGINAL

# transformers turns these back by itself; of others it only runs them.
PLAIN = {
    "bitsandbytes": "from_pretrained(MODEL).dequantize(), then save_pretrained; or " + ORIGINAL,
    "fp8": WHILE_LOADING.format("FineGrainedFP8Config"),
    "mxfp4": WHILE_LOADING.format("Mxfp4Config"),
    "compressed-tensors": WHILE_LOADING.format("CompressedTensorsConfig"),
}
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4"}


def method(config: Any) -> str:
    """The name of the method in a `quantization_config`; bitsandbytes' older ones don't say theirs."""
    fields = config if isinstance(config, dict) else {}
    named = fields.get("quant_method") or fields.get("format")
    if not named and any(fields.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        named = "bitsandbytes"
    return str(named or "a method that it doesn't name")


def how_to_get_plain(config: Any) -> str:
    """What a user can do to get plain weights."""
    return PLAIN.get(method(config), ORIGINAL)


def spelled(config: Any) -> str:
    """The method as people write it."""
    return NAMES.get(method(config), method(config))
