"""Text from a model."""

from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def continue_text(model: Any, folder: Path, prompt: str, *, tokens: int) -> str:
    """The prompt and the model's own continuation of it, greedy, by the tokenizer in `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(made[0], skip_special_tokens=True)
