"""Where a model comes from (a folder, a GGUF file, the Hub) and what goes along with its weights."""

import re
import shutil
from pathlib import Path

from shearling.errors import UserError
from shearling.weights.checkpoint import PICKLE_PATTERNS
from shearling.weights.checkpoint import fingerprint as fingerprint
from shearling.weights.config import check_links
from shearling.weights.gguf import convert

# Weights in safetensors, and what carry() wants. Pickles never: they aren't even downloaded.
HUB_PATTERNS = (
    "model*.safetensors",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "merges.txt",
    "[Ll][Ii][Cc][Ee][Nn][Ss][Ee]*",
    "[Nn][Oo][Tt][Ii][Cc][Ee]*",
    "[Uu][Ss][Ee]_[Pp][Oo][Ll][Ii][Cc][Yy]*",
)
CARRIED_FILES = frozenset(
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "tekken.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    )
)
CARRIED_PREFIXES = ("license", "notice", "use_policy")
CARRIED_FOLDER = "additional_chat_templates"


def resolve(model: str) -> Path:
    """A local model folder for what the user typed: a folder, a .gguf file (converted and cached) or a Hub id org/name.

    Raises UserError for a path that isn't there, a Hub that can't be reached and a GGUF that transformers can't read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf" and path.is_file():
        return convert(path)
    if path.exists() or model.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf":
        raise UserError(
            f"model {model}",
            found="a file that isn't GGUF" if path.exists() else "nothing at this path",
            expected="a folder with config.json and safetensors, or a .gguf file",
            change="give the model's folder itself",
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model, flags=re.ASCII):
        raise UserError(
            f"model {model}",
            found="neither a local folder nor a Hub id",
            expected="a folder, a .gguf file, or a Hub id such as HuggingFaceTB/SmolLM2-135M",
            change="check the spelling; a Hub id has an organisation, a slash and a name",
        )
    return _download(model)


def carry(source: Path, out: Path) -> tuple[str, ...]:
    """Copies tokenizer, processor and licence files, templates and generation config byte for byte; gives their names.

    Templates are copied as data and never rendered. Config and weights aren't copied. Raises UserError for links that
    lead out of the source.
    """
    source, out = Path(source), Path(out)
    check_links(source)
    out.mkdir(parents=True, exist_ok=True)
    carried = [path for path in sorted(source.iterdir()) if path.is_file() and _is_carried(path.name)]
    carried += [path for path in sorted((source / CARRIED_FOLDER).glob("*")) if path.is_file()]
    for path in carried:
        target = out / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    return tuple(path.relative_to(source).as_posix() for path in carried)


def _is_carried(name: str) -> bool:
    return name in CARRIED_FILES or name.lower().startswith(CARRIED_PREFIXES)


def _download(model: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(PICKLE_PATTERNS)
            )
        )
    except GatedRepoError as error:
        found, change = "a gated model", f"accept its terms on https://huggingface.co/{model} and run `hf auth login`"
        cause = error
    except RepositoryNotFoundError as error:
        found, change = (
            "not a local folder, and the Hub has no such model",
            "check the spelling; log in if it's private",
        )
        cause = error
    except Exception as error:  # each release has another HTTP library underneath, with errors of its own
        # By its type alone: the message may quote an address with a token in it.
        found = f"not a local folder, and the Hub could not be reached ({type(error).__name__})"
        change, cause = "check the path or the network; what was downloaded is kept, and trying again goes on", error
    raise UserError(
        f"model {model}", found=found, expected="a model on this machine or on the Hub", change=change
    ) from (cause)
