"""What a run is asked to do: one model for each stage, from the command line and from YAML alike."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shearling.axes.target import parse_target
from shearling.errors import UserError, closest, nearest, raise_all
from shearling.masks.options import PAPER, Options
from shearling.mixture.options import Options as Mixture
from shearling.stage import IDENTITY_FILE
from shearling.strict_yaml import StrictLoader, read_mapping
from shearling.teacher.options import Options as Teacher

RECIPE_FILE = "recipe.yaml"
LEFT_BY_RUN = (
    "# Left by `shearling run`: what it was asked, with all defaults.\n"  # its first line; others' aren't replaced
)
BRANCH = re.compile(r"(dict|list)\[.*|constrained-\w+|str|int|float")  # what pydantic calls the branches of a union
FLAGS = {"micro_sequences": "--micro-batch", "sinks": "--sink"}  # keys that the command line has another name for
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: object) -> int:
    """A count of tokens: a whole number, or one with a unit, as 200K, 1.5M, 50B. Raises ValueError: what it expects."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMBT]?)\s*", str(value).upper())
    if not match:
        raise ValueError("a count of tokens, as 200K, 1.5M or 50B")
    return round(float(match[1]) * UNITS[match[2]])


def parse_micro(value: object) -> int | str:
    """Windows at a time: a whole number, or auto for as many as there is memory for. Raises ValueError."""
    if value != "auto" and not (re.fullmatch(r"[0-9]+", str(value)) and int(str(value)) > 0):
        raise ValueError("a number of windows, or auto")
    return "auto" if value == "auto" else int(str(value))


def parse_recomputed(value: object) -> object:
    """Which activations are recomputed: by full all but the ends of blocks, of those by selective no products."""
    return {"True": "full", "False": "none"}.get(str(value), value)


def parse_shape(value: object) -> dict[str, int]:
    """A target shape: a mapping, or text as `--to` takes it. Raises UserError."""
    if isinstance(value, Mapping):
        return parse_target(",".join(f"{key}={size}" for key, size in value.items()))
    if not isinstance(value, str):
        change = "name what to cut, as hidden_size=N,..."
        raise UserError("target", found=repr(value), expected="sizes of the model", change=change)
    return parse_target(value)


def parse_shares(text: str, what: str, kind: type[int] | type[float] = float) -> dict[str, Any]:
    """Numbers by domain, as a=.5,b=.5. Raises UserError."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.rpartition("="))  # a domain may be lang=en
        try:
            number = kind(value if name else "")
        except ValueError as error:
            raise UserError(what, found=repr(part), expected="domain=number", change="write as a=.5,b=.5") from error
        if name in found:
            raise UserError(what, found=f"{name!r} twice", expected="each domain once", change="leave one out")
        found[name] = number
    return found


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]
Target = Annotated[dict[str, int], BeforeValidator(parse_shape)]
Dtype = Literal["float32", "bfloat16", "float16"]
AtEnd = Literal["refuse", "stop", "redistribute", "repeat"]
Recomputed = Annotated[Literal["none", "selective", "full"], BeforeValidator(parse_recomputed)]
Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what torch's generators take
Micro = Annotated[int | Literal["auto"], BeforeValidator(parse_micro)]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class Training(Section):
    """What pruning and healing share. What is left out is chosen from the model's size, the budget and the data."""

    tokens: Tokens | None = None
    steps: int | None = Field(default=None, gt=0)
    lr: float | None = Field(default=None, gt=0)
    batch_tokens: Tokens | None = None
    seq_len: int | None = Field(default=None, gt=1)
    micro_sequences: Micro | None = None
    mixture: Mixture = Mixture()
    teacher: Teacher = Teacher()
    repeats: dict[str, Count] | Count | None = None  # readings of a domain; left out: unlimited
    at_end: AtEnd = "refuse"  # when those are used up
    separate_documents: bool = False  # kept apart in attention and positions; else packed
    workers: int = Field(default=1, ge=0)  # threads that read ahead
    eval_windows: int = Field(default=64, gt=0)  # held-out windows a domain
    eval_every: int | None = Field(default=None, ge=0)  # steps; left out: a tenth of the run
    lora_rank: Count | None = None  # of adapters that learn in place of weights, which stay as they are in bfloat16
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # the latter keeps its moments in 8 bits
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    warmup: float = Field(default=0.03, ge=0, lt=1)
    decay: float = Field(default=1.0, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0)
    seed: Seed = 0
    device: str | None = None
    dtype: Dtype | None = None  # of the result; left out: the source's
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    compile: bool = False
    kernels: Literal["torch", "liger"] = "torch"
    activation_checkpointing: Recomputed = "none"
    offload: bool = False  # weights, gradients and moments lie in the computer's memory, the GPU has a block at a time
    replicate: int = Field(default=1, gt=0)  # of several ranks, the groups that each hold a whole model
    log_every: int | None = Field(default=None, gt=0)  # steps; left out: 1, on a GPU 10
    sinks: list[Literal["tensorboard", "wandb"]] = []  # where figures go beside the record
    save_every: int | None = Field(default=None, gt=0)  # steps between checkpoints; left out: ten minutes
    keep_last: int = Field(default=2, gt=0)  # of them
    keep_every: int | None = Field(default=None, gt=0)  # steps; those that it divides stay for good

    @model_validator(mode="after")
    def _one_budget(self) -> "Training":
        if self.tokens is not None and self.steps is not None:
            found = f"both, {self.tokens} tokens and {self.steps} steps"
            raise UserError("tokens and steps", found=found, expected="one of them", change="leave one out")
        if self.mixture.signal == "teacher_kl" and not self.teacher.wanted:
            change = "give a teacher's share, or another signal"
            raise UserError("mixture.signal", found="teacher_kl, no teacher", expected="a teacher", change=change)
        if self.mixture.signal == "teacher_kl" and self.mixture.reference is not None:
            change = "leave the reference out: the KL is held against 0"
            raise UserError("mixture", found="a reference beside teacher_kl", expected="one of them", change=change)
        if self.activation_checkpointing == "selective" and self.compile:  # which hides what is to be kept
            found, change = "selective with compile", "take full, or leave compile out"
            raise UserError("activation_checkpointing", found=found, expected="one of them", change=change)
        if self.kernels == "liger" and self.compile:
            change = "leave one of them out: compile fuses the same operations"
            raise UserError("kernels", found="liger with compile", expected="one of them", change=change)
        if self.teacher.hidden and self.compile:
            change = "leave one of them out"  # hooks set on a compiled model aren't run
            raise UserError("teacher.hidden", found="it with compile", expected="one of them", change=change)
        return self

    @property
    def frozen(self) -> bool:
        """Whether weights stay as they are."""
        return self.lora_rank is not None

    @property
    def bits(self) -> int:
        """That the optimizer keeps each moment of a weight in."""
        return 8 if self.optimizer == "adamw8bit" else 32

    def identity(self) -> dict[str, Any]:
        """What makes a stage with these settings this one: all but what changes nothing in the result, and paths, which
        are spelled in many ways; the verbs say what is there.
        """
        kept = ("save_every", "keep_last", "keep_every")
        same = dict.fromkeys(("workers", "replicate", "offload", "log_every", "sinks", *kept), True)
        paths = {"mixture": {"reference"}, "teacher": {"model", "cache"}}
        in_phases = {"phases": {"__all__": {"data": True, "mixture": {"reference"}}}}
        return self.model_dump(mode="json", exclude={**same, **paths, **in_phases})


class Prune(Training):
    """To a target shape, by learned masks or by one-shot scores."""

    to: Target
    method: Literal["auto", "masks", "activation"] = "auto"
    calibration_windows: int = Field(default=128, gt=0)
    masks: Options = Options()
    masks_only: bool = False  # weights stay as they are, in bfloat16 meanwhile: some 2 bytes a parameter
    decay: float = Field(default=0.0, ge=0, le=1)  # healing goes on from the rate that pruning ends with

    @model_validator(mode="after")
    def _masks_are_learned(self) -> "Prune":
        if self.kernels == "liger":
            change = "leave kernels out; --compile fuses what they would"
            raise UserError("kernels", found="liger with masks", expected="torch", change=change)
        if self.frozen and self.method == "activation":
            what = "masks_only" if self.masks_only else "lora_rank"
            change = f"take --method masks, or leave {what} out"
            raise UserError(what, found="it with one-shot scores", expected="learned masks", change=change)
        if self.masks_only and self.lora_rank:
            change = "leave one of them out"
            raise UserError("lora_rank", found="it with masks_only", expected="one of them", change=change)
        return self

    @property
    def frozen(self) -> bool:
        return self.masks_only or self.lora_rank is not None


class Phase(Section):
    """One of several phases of healing: whatever differs from the `heal` section that it stands in."""

    tokens: Tokens | None = None
    steps: int | None = Field(default=None, gt=0)
    data: str | None = None  # a token store of its own, such as one of post-training text
    lr: float | None = Field(default=None, gt=0)
    batch_tokens: Tokens | None = None
    seq_len: int | None = Field(default=None, gt=1)
    micro_sequences: Micro | None = None
    mixture: Mixture | None = None
    repeats: dict[str, Count] | Count | None = None
    at_end: AtEnd | None = None
    separate_documents: bool | None = None
    schedule: Literal["trapezoid", "cosine"] | None = None
    warmup: float | None = Field(default=None, ge=0, lt=1)
    decay: float | None = Field(default=None, ge=0, le=1)


class Heal(Training):
    """Continued pre-training of the cut, in one phase or in several."""

    phases: list[Phase] = []

    @model_validator(mode="after")
    def _budgets(self) -> "Heal":
        for number, phase in enumerate(self.phases):
            if (phase.tokens is None) == (phase.steps is None):
                found = f"tokens {phase.tokens} and steps {phase.steps}"
                change = "give each phase a budget of its own"
                raise UserError(f"phases.{number}", found=found, expected="one of them", change=change)
        if self.phases and (self.tokens is not None or self.steps is not None):
            change = "leave the section's own tokens or steps out"
            raise UserError("heal", found="a budget beside phases", expected="those of the phases", change=change)
        if len(self.phases) > 1 and any(s.schedule == "cosine" for s in (self, *self.phases)):
            change = "leave it out: trapezoid, which stays up between phases"
            raise UserError("schedule", found="cosine in phases", expected="trapezoid", change=change)
        if self.phases:
            self.each_phase()
        return self

    def each_phase(self) -> "list[tuple[Heal, str | None, bool]]":
        """A section for each phase, whole; the data of its own that it names; whether its mixture is the section's.

        The rate stays up between phases and rises only at the first: warm-up and decay are for the ends of the run.
        """
        if not self.phases:
            return [(self, None, True)]
        found, last = [], len(self.phases) - 1
        for number, phase in enumerate(self.phases):
            between = {"warmup": self.warmup if number == 0 else 0.0, "decay": self.decay if number == last else 0.0}
            given = {name: value for name, value in phase if value is not None and name != "data"}
            values = {**dict(self), "phases": [], **between, **given}
            found.append((type(self).model_validate(values), phase.data, phase.mixture is None))
        return found


class Input(Section):
    """One of the inputs, where it is read in another way than the others: what is left out is as in the section."""

    path: str
    text_column: str | None = None
    messages_column: str | None = None
    assistant_loss_only: bool | None = None
    tokens_dtype: str | None = None
    skip_broken: bool | None = None


class Data(Section):
    """Documents to tokenise: files, folders, folders of folders. An input may be a path or a section of its own."""

    inputs: list[str | Input]
    held_out: float = Field(default=0.01, gt=0, lt=1)
    seed: Seed = 0
    processes: int | None = Field(default=None, gt=0)  # left out: the cores, where the documents are worth it
    text_column: str = "text"
    messages_column: str | None = None
    assistant_loss_only: bool = False
    tokens_dtype: str = "int64"  # of MDS columns of tokens, which don't say
    skip_broken: bool = False


class Inspect(Section):
    """What to tell of a token store: how often a budget of training tokens under a mixture reads each domain."""

    tokens: Tokens | None = None
    weights: dict[str, float] | None = None  # left out: by tokens
    tokenizer: str | None = None  # for the samples; left out: the one that the store names, if it is on this machine


class Eval(Section):
    """Held-out loss of a model as it is."""

    seq_len: int | None = Field(default=None, gt=1)
    windows: int | None = Field(default=None, gt=0)  # a domain; left out: all
    device: str | None = None
    dtype: Dtype | None = None  # to compute in; left out: float32


def parse_data(value: object) -> Data | str:
    """A token store's folder as it is, or the section of documents to make one from. Raises UserError."""
    if isinstance(value, Data | str):
        return value
    if isinstance(value, Mapping):
        return validated(Data, value, under="data.")
    raise UserError(
        "data", found=repr(value), expected="a token store's folder, or a section with inputs", change="change data"
    )


class Recipe(Section):
    """A whole run. A stage that is left out isn't done."""

    model: str
    out: str
    arch: str | None = None  # the file of the model's family, where that has no table
    data: Annotated[Data | str, BeforeValidator(parse_data)]  # documents, or a token store that is there already
    prune: Prune
    heal: Heal | None = None


# Sheared-LLaMA (arXiv 2310.06694), section 3 and appendix: what `prune --paper` stands for.
PAPER_PRUNE: dict[str, Any] = {
    "method": "masks",
    "tokens": "419430400",
    "batch_tokens": "131072",
    "seq_len": 4096,
    "lr": 1e-4,
    "schedule": "cosine",
    "warmup": 0.1,
    "masks": asdict(PAPER),
    "mixture": {"schedule": "dynamic", "rule": "paper", "every": 50},
}


def validated(kind: type[S], values: Mapping[str, Any], *, under: str = "") -> S:
    """The section that `values` describe. Raises UserError for every field that doesn't fit, unknown ones with the
    nearest known name. `under` is the section's own path, for messages.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        told: dict[tuple[str, str], UserError] = {}  # all of a union's branches say it
        for detail in error.errors():
            one = _explain(kind, detail, under)
            told[".".join(map(str, _path(detail))), str(one).partition(": found")[0]] = one
        raise_all(list(told.values()))
        raise


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key.key=value` overrides. Raises UserError for whatever doesn't fit."""
    values = read_mapping(path, what="recipe", change="see recipes/")
    for setting in settings:
        _override(values, setting)
    return validated(Recipe, values)


def check_out(recipe: Recipe, out: Path) -> None:
    """Raises UserError where something else than a run is in the way, a recipe of the user's own that isn't this, or
    the model of a run that ended with another stage.
    """
    path, change = out / RECIPE_FILE, "choose another out, or move what is there away"
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(entry.name != f"{path.name}.new" for entry in out.iterdir())):
            found = "something that isn't a run"
            raise UserError(f"out {out}", found=found, expected="nothing, or a run", change=change)
    elif not _left_by_run(path) and not _says(path, recipe):
        found, expected = "a recipe that no run has left there, and another than this", "one of a run, or none"
        raise UserError(f"recipe {path}", found=found, expected=expected, change=change)
    last, published = "heal" if recipe.heal else "prune", out / "model" / IDENTITY_FILE
    if published.is_file() and (stage := json.loads(published.read_bytes())["identity"]["stage"]) != last:
        change = f"move it away ({out / stage} has the same), or choose another out"
        raise UserError(f"{out / 'model'}", found=f"the model of {stage}", expected=f"that of {last}", change=change)


def write_recipe(values: Mapping[str, Any], out: Path) -> None:
    """Leaves a run's resolved recipe's values in its folder, which is made; the user's own stays. Raises UserError."""
    path = out / RECIPE_FILE
    if path.is_file() and not _left_by_run(path):
        return
    new = path.with_name(f"{path.name}.new")
    try:
        out.mkdir(parents=True, exist_ok=True)
        new.write_text(LEFT_BY_RUN + yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
        new.replace(path)
    except OSError as error:
        change = "choose another out, or mend its permissions"
        raise UserError(f"out {out}", found=error.strerror, expected="a folder to write", change=change) from error


def _left_by_run(path: Path) -> bool:
    return path.read_bytes().startswith(LEFT_BY_RUN.encode())


def _says(path: Path, recipe: Recipe) -> bool:
    try:
        return load_recipe(path) == recipe
    except UserError:
        return False


def _override(values: dict[str, Any], setting: str) -> None:
    path, sign, value = setting.partition("=")
    if not sign:
        raise UserError("--set", found=repr(setting), expected="key=value", change="write as heal.tokens=2M")
    *outer, last = path.strip().split(".")
    for key in outer:
        inner = values[key] = {} if values.get(key) is None else values[key]
        if not isinstance(inner, dict):
            raise UserError(
                "--set", found=f"{path}, where {key} is {inner!r}", expected="a section", change="shorten it"
            )
        values = inner
    try:
        values[last] = yaml.load(value, StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {path}", found=repr(value), expected="a YAML value", change="quote it") from error


def _explain(kind: type[BaseModel], detail: Any, under: str) -> UserError:
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    path = _path(detail)
    if detail["type"] == "literal_error" and isinstance(path[-1], int):
        path = path[:-1]  # one of a list of words, which is told by itself
    where = under + ".".join(map(str, path))
    last = next((part for part in reversed(path) if isinstance(part, str)), str(path[-1]))  # an item's is its list's
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return UserError(
            where, found="an unknown key", expected="a known one", change=nearest(last, _known(kind, path))
        )
    if detail["type"] == "missing":
        return UserError(where, found="nothing", expected="a value", change=f"add {last}")
    where += f" ({FLAGS[last]})" if last in FLAGS else ""
    expected = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    choices = re.findall("'([^']+)'", expected) if detail["type"] == "literal_error" else ()
    meant = closest(str(detail["input"]), choices)
    change = f"did you mean {meant!r}?" if meant else f"change {last}"
    return UserError(where, found=repr(detail["input"]), expected=expected, change=change)


def _path(detail: Any) -> list[str | int]:
    return [part for part in detail["loc"] if not BRANCH.fullmatch(str(part))]


def _known(kind: Any, path: Sequence[str | int]) -> list[str]:
    """The keys of the section that the last part of `path` stands in."""
    for part in path[:-1]:
        field = kind.model_fields.get(part) if hasattr(kind, "model_fields") else None
        options = [field.annotation, *get_args(field.annotation)] if field else []
        kind = next((o for o in options if is_dataclass(o) or hasattr(o, "model_fields")), kind)
    return [f.name for f in fields(kind)] if is_dataclass(kind) else list(kind.model_fields)
