"""Small sources, trained from random weights on five domains: a Llama of three million parameters for healing.py, or a
Qwen3-MoE of two million for compare_arms.py.

    python benchmarks/small_source.py TEXT_FOLDER WORK_FOLDER [STEPS] [llama|qwen3_moe]

TEXT_FOLDER has a folder for each domain. WORK_FOLDER gets `corpus`, links to those of DOMAINS; `inputs/tokenizer`,
1,024 byte-level tokens trained on the beginning of each; `store`; and `source`, trained in shares of tokens for STEPS
of 2,048 tokens. What is finished isn't done again.
"""

import gzip
import json
import sys
from itertools import islice
from pathlib import Path

from shearling.demo.models import SOURCE, write_tokenizer, write_untrained
from shearling.recipe import Data, Heal, validated
from shearling.stage import Stage
from shearling.verbs.data import make_store
from shearling.verbs.heal import heal

DOMAINS = ("stories", "code", "math", "wiki", "books")
TOKENIZER_DOCUMENTS = 400  # of each domain
TOKENIZER_CHARACTERS = 20_000  # of a document
LLAMA = {
    **SOURCE,
    "hidden_size": 192,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 512,
}
EXPERTS = {
    **SOURCE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
}
MODELS = {"llama": LLAMA, "qwen3_moe": EXPERTS}


def write_beginnings(corpus: Path, out: Path) -> Path:
    """Some documents of each domain, as the tokenizer's trainer reads them."""
    for domain in DOMAINS:
        (out / domain).mkdir(parents=True)
        with (
            gzip.open(corpus / domain / "train.jsonl.gz", "rt", encoding="utf-8") as lines,
            open(out / domain / "text.jsonl", "w", encoding="utf-8") as file,
        ):
            for line in islice(lines, TOKENIZER_DOCUMENTS):
                file.write(json.dumps({"text": json.loads(line)["text"][:TOKENIZER_CHARACTERS]}) + "\n")
    return out


def main(texts: Path, work: Path, steps: str = "400", model: str = "llama") -> None:
    corpus = work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        if not (corpus / domain).exists():
            (corpus / domain).symlink_to(texts.resolve() / domain)
    inputs = Stage(work / "inputs", {"verb": "small source", "config": MODELS[model]})
    if not inputs.done:
        with inputs as folder:
            write_tokenizer(write_beginnings(corpus, folder / "beginnings"), folder / "tokenizer")
            write_untrained(MODELS[model], folder / "untrained", tokenizer=folder / "tokenizer", seed=0)
    asked = validated(Data, {"inputs": [str(corpus)]})
    make_store(asked, tokenizer=str(inputs.out / "tokenizer"), out=str(work / "store"))
    options = {"steps": int(steps), "seq_len": 128, "batch_tokens": 2048, "lr": 3e-3, "warmup": 0.05, "device": "cpu"}
    healing = validated(Heal, {**options, "mixture": {"schedule": "proportional"}, "eval_every": 0})
    done = heal(str(inputs.out / "untrained"), data=str(work / "store"), out=str(work / "source"), asked=healing)
    print(f"{done.parameters:,} parameters, {done.tokens:,} tokens: {dict(done.losses)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
