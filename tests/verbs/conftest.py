"""A tiny Llama with its tokenizer and a token store in three domains, made once; all that the verbs need."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shearling.recipe import Data, Heal, Prune, validated
from shearling.verbs.data import make_store
from shearling.verbs.prune import prune

WORDS = {
    "code": "def return if else for in x y z + = ( ) : None True import self list dict range",
    "prose": "the sheep was shorn in spring and its wool went to the mill by the river where a dog sat",
    "sums": "one two three four five six seven eight nine ten plus minus times is equal to zero",
}
SPARE_ROWS = 4
TARGET = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
TRAINING = {"steps": 4, "seq_len": 32, "batch_tokens": 128, "eval_windows": 8, "eval_every": 2, "device": "cpu"}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """Documents by domain."""
    draw = random.Random(0)
    return {domain: [" ".join(draw.choices(words.split(), k=60)) for _ in range(24)] for domain, words in WORDS.items()}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> Path:
    """A folder with a folder of JSON lines for each domain."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, documents in texts.items():
        (folder / domain).mkdir()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (folder / domain / "part.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, texts) -> Path:
    """A random Llama in float32 with a tokenizer of its own, a chat template and a licence."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for documents in texts.values() for text in documents], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(fast) + SPARE_ROWS,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0,\n "max_new_tokens": 7}\n')
    (folder / "LICENSE").write_bytes(b"Do as you like.\r\n")
    return folder


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory, corpus, model_folder) -> Path:
    """The corpus in the model's tokens."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    asked = validated(Data, {"inputs": [str(corpus)], "held_out": 0.2})
    make_store(asked, tokenizer=str(model_folder), out=str(folder))
    return folder


@pytest.fixture
def copied(tmp_path, model_folder):
    """Copies the model, for a test to damage; `config` changes keys of config.json."""

    def copy(**config) -> Path:
        folder = Path(shutil.copytree(model_folder, tmp_path / "copied"))
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return copy


@pytest.fixture
def wide(tmp_path, model_folder) -> Path:
    """A model of 7 million parameters."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "wide"))
    config = LlamaConfig.from_pretrained(folder)
    config.update({"hidden_size": 256, "head_dim": 64, "intermediate_size": 4096, "num_hidden_layers": 2})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target() -> dict[str, int]:
    return dict(TARGET)


@pytest.fixture(scope="session")
def ask_prune():
    """What `prune` is asked, in a few steps."""
    return lambda **options: validated(Prune, {"to": TARGET, **TRAINING, "calibration_windows": 8, **options})


@pytest.fixture(scope="session")
def cut(tmp_path_factory, model_folder, store_folder, ask_prune) -> Path:
    """The model cut to the target by scores."""
    out = tmp_path_factory.mktemp("cut") / "cut"
    prune(str(model_folder), data=str(store_folder), out=str(out), asked=ask_prune(method="activation"))
    return out


@pytest.fixture(scope="session")
def ask_heal():
    """What `heal` is asked, in a few steps."""
    return lambda **options: validated(Heal, {**TRAINING, **options})
