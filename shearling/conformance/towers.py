"""Text models inside a whole: what is said of the other parts, tried on small random wholes of transformers' classes.

B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.arch.config import config_at
from shearling.arch.whole import TIES, check_parts, text_config, whole_config
from shearling.axes.index import Kept
from shearling.axes.inside import Inside
from shearling.axes.shape import Shape, shape_of
from shearling.axes.spec import Family
from shearling.axes.table import Tensor as Row
from shearling.conformance.exact import LEAST_EFFECT
from shearling.conformance.finding import Finding
from shearling.conformance.model import Small, draw, norms_of, parsed, relative, tokens
from shearling.conformance.small import telling
from shearling.conformance.table import SHOWN, differences
from shearling.conformance.targets import Unit, random_cut
from shearling.cut.extract import Cut
from shearling.errors import UserError
from shearling.masks.attach import Attached
from shearling.weights.checkpoint import Checkpoint
from shearling.weights.config import read_config
from shearling.weights.model import Beside, load_model, reader, save_model
from shearling.weights.table import check_table, parts_of

# A small tower, whatever it calls its sizes. An image is 4 by 4 patches of 7 by 7 pixels.
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "num_position_embeddings": 16,
}
IMAGE_TOKENS = 4
IMAGE_PATCHES = (1, 4, 4)  # over time, height and width
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass(frozen=True)
class Whole:
    """A whole on the CPU, its text model (of the same modules), and the files that transformers saved it as."""

    text: Small
    model: Any
    checkpoint: Checkpoint

    def ids(self) -> Tensor:
        """Random text, int64 [B, T], without a token that stands for something else."""
        return tokens(self.text.shape["vocab_size"] - len(_marks(self.checkpoint.config)))

    def picture(self) -> dict[str, Tensor]:
        """One text of B = 1 with an image in it, as this kind of model takes it."""
        token, around = self.model.config.image_token_id, self.ids()[:1]
        ids = torch.cat([around[:, :5], torch.full((1, IMAGE_TOKENS), token), around[:, 5:]], dim=1)
        marked = (ids == token).long()
        generator = torch.Generator().manual_seed(4)
        vision = self.model.config.vision_config.to_dict()
        if "image_size" in vision:
            pixels = torch.randn(
                1, vision["num_channels"], vision["image_size"], vision["image_size"], generator=generator
            )
            return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": marked}
        grid = torch.tensor([IMAGE_PATCHES])
        of_each = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        pixels = torch.randn(int(grid.prod()), of_each, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": marked}

    @torch.no_grad()
    def logits(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, use_cache=False).logits


def wholes(family: Family) -> dict[str, dict[str, Any]]:
    """Raw configs by name: the telling ones of the text model, under a small tower."""
    return {name: _with_tower(family, text) for name, text in telling(family, _inside(family).text_type).items()}


def default_whole(family: Family) -> dict[str, Any]:
    """transformers' own config of a whole; what the text model's size is repeated in fits it."""
    inside = _inside(family)
    default = parsed({"model_type": family.model_types[0]}).to_dict()
    config = {key: value for key, value in default.items() if value is not None}
    config[inside.key] = {key: value for key, value in config[inside.key].items() if value is not None}
    return _following(family, config)


def random_whole(
    family: Family, config: Mapping[str, Any], folder: Path, *, name: str = "", dtype: torch.dtype = torch.float32
) -> Whole:
    """A whole of this config, every parameter drawn anew, saved in `folder` by transformers in `dtype`."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    inside = _inside(family)
    model = AutoModelForImageTextToText.from_config(parsed(config), dtype=dtype, **PLAIN).eval()
    norms = norms_of(family, text_config(family, config))
    draw(model, {inside.on_module(norm): how for norm, how in norms.items()})
    model.save_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    text = text_config(family, checkpoint.config)
    small = Small(name, family, text, shape_of(family, text), _text_of(model, inside))
    return Whole(small, model, checkpoint)


def table_is_whole(family: Family, config: Mapping[str, Any], name: str) -> Finding:
    """The rows against the whole's class on the meta device: every parameter of the text model, and the connectors."""
    from transformers import AutoModelForImageTextToText

    inside, text = _inside(family), text_config(family, config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(parsed(config))
    sizes = shape_of(family, text).axes
    counted = {inside.on_module(row.at(layer)): row.shape(sizes) for row, layer in family.named(text)}
    counted |= {row.name: row.shape(sizes) for row in family.connectors}
    there = {
        parameter: tuple(p.shape)
        for parameter, p in model.named_parameters()
        if parameter in counted or parameter.startswith(tuple(inside.module.values()))
    }
    return Finding("table = whole", name, why="; ".join([*differences(counted, there)][:SHOWN]))


def defaults_of_parts(family: Family) -> Iterator[Finding]:
    """Each default of the table against what transformers fills in, the text model's and the other parts'."""
    filled = parsed({"model_type": family.model_types[0]}).to_dict()
    for key, counted in family.defaults.items():
        part, _, own = key.rpartition(".")
        there = filled[part or _inside(family).key].get(own)
        if key == "tie_word_embeddings":
            there = filled[key]
        wrong = there is not None and family.value({}, counted) != there
        yield Finding("defaults", key, why=f"{counted} in the table, {there} in transformers" if wrong else "")


def files_are_parts(whole: Whole) -> Finding:
    """What `save_pretrained` writes is the table's rows and what is carried, and nothing else."""
    text, why = whole.text, ""
    try:
        check_parts(text.family, text.config, text.shape)
        check_table(whole.checkpoint, text.family, text.config, text.shape)
    except UserError as error:
        why = str(error)
    return Finding("names on disk", text.name, why=why)


def whole_is_cut(whole: Whole, targets: Mapping[Unit, Shape], folder: Path) -> Iterator[Finding]:
    """The masked whole against its cut, written, and loaded again by transformers alone: with text, with an image."""
    text = {"input_ids": whole.ids()}
    inputs = {"text": text, "an image": whole.picture()}
    plain = whole.logits(**inputs["an image"])
    for number, (unit, target) in enumerate(targets.items()):
        kept, masks = random_cut(whole.text.shape, target)
        with _masked(whole, masks):
            masked = {kind: whole.logits(**some) for kind, some in inputs.items()}
        there = folder / str(number)
        write_cut(whole, Cut(whole.text.family, whole.text.config, target, kept, masks), there)
        cut, stray = _loaded(there)
        yield Finding("keys", whole.text.name, unit, why=stray)
        for kind, some in inputs.items():
            with torch.no_grad():
                error = relative(cut(**some, use_cache=False).logits, masked[kind])
            yield Finding(f"masked = cut = reloaded, {kind}", whole.text.name, unit, error)
        moved = relative(masked["an image"], plain) > LEAST_EFFECT
        yield Finding("masks", whole.text.name, unit, why="" if moved else "they change next to nothing")
        with torch.no_grad():
            alone = load_model(there)(**text, use_cache=False).logits
        yield Finding("text model alone", whole.text.name, unit, relative(alone, masked["text"]))
        yield Finding("carried", whole.text.name, unit, why=", ".join(_changed(whole, there, carried=True)))


def identity_of_whole(whole: Whole, folder: Path) -> Finding:
    """A cut of nothing, written: every tensor bit for bit, and the config as it was."""
    text = whole.text
    write_cut(whole, Cut(text.family, text.config, text.shape, Kept({}, text.shape.axes)), folder)
    wrong = [*_changed(whole, folder, carried=False)]
    if read_config(folder) != whole.checkpoint.config:
        wrong.append("config.json")
    return Finding("identity", text.name, why=", ".join(wrong[:SHOWN]))


def image_matters(whole: Whole) -> Finding:
    """Other pixels give other logits: else nothing was said of the tower."""
    picture = whole.picture()
    other = {**picture, "pixel_values": picture["pixel_values"].flip(-1)}
    effect = relative(whole.logits(**other), whole.logits(**picture))
    return Finding("the image matters", whole.text.name, why="" if effect > LEAST_EFFECT else f"{effect:.1e}")


def write_cut(whole: Whole, cut: Cut, folder: Path) -> None:
    """Writes a cut of the whole's text model, with everything beside it, in the whole's own dtype."""
    family, source = cut.family, whole.checkpoint
    held, connectors = reader(whole.text.model), dict(whole.model.named_parameters())

    def read(row: Row, layer: int | None) -> Tensor:
        return connectors[row.name].detach() if row in family.connectors else held(row, layer)

    dtype = whole.model.dtype
    named = str(dtype).removeprefix("torch.")
    kept = cut.kept
    config = config_at(family, cut.config, cut.shape, layers=kept.layers, dtype=named, rotary=kept.rotary)
    carried = parts_of(source, family, cut.config, whole.text.shape).carried
    folder.mkdir(parents=True)
    save_model(
        folder,
        family=family,
        config=config,
        shape=cut.shape,
        dtype=dtype,
        tensor=lambda row, layer: cut.tensor(row, layer, read),
        beside=Beside(whole_config(family, source.config, config, cut.shape), carried),
    )


def _changed(whole: Whole, folder: Path, *, carried: bool) -> Iterator[str]:
    """Names of tensors that aren't in `folder` as they were: of all, or of those that are carried."""
    text, source, written = whole.text, whole.checkpoint, Checkpoint.open(folder)
    parts = parts_of(source, text.family, text.config, text.shape)
    for name in parts.carried.names if carried else source.names:
        there = name in written.tensors and written.info(name).dtype == source.info(name).dtype
        if not there or not torch.equal(*(one.read(name).view(torch.uint8) for one in (written, source))):
            yield name


@contextmanager
def _masked(whole: Whole, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the whole's modules are masked; what connectors give takes the mask on hidden, as embeddings do."""
    text = whole.text
    attached = Attached(text.model, text.family, config=text.config, axes=tuple(masks))
    attached.set(masks)
    modules = {row.name.removesuffix(".weight") for row in text.family.connectors if not row.is_bias}
    paths = (path if path + ".weight" in _names(whole) else path.rpartition(".")[0] for path in modules)
    hidden = masks.get("hidden")
    hooks = [
        whole.model.get_submodule(path).register_forward_hook(lambda module, args, given: given * hidden)
        for path in (paths if hidden is not None else ())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        attached.remove()


def _loaded(folder: Path) -> tuple[Any, str]:
    """The whole in a folder, and the keys that transformers missed there, didn't expect, or found of another size."""
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True, **PLAIN
    )
    model, report = loaded
    stray = [f"{kind}: {sorted(map(str, names))[:SHOWN]}" for kind, names in report.items() if names and "keys" in kind]
    return model.eval(), ", ".join(stray)


def _text_of(model: Any, inside: Inside) -> Any:
    """A whole's text model as a causal model of its own, of the very same modules."""
    from transformers import AutoModelForCausalLM

    config = getattr(model.config, inside.key)
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(config)
    for child, _ in list(text.named_children()):
        setattr(text, child, model.get_submodule(inside.on_module(f"{child}.").removesuffix(".")))
    return text.eval()


def _with_tower(family: Family, text: Mapping[str, Any]) -> dict[str, Any]:
    inside, sizes = _inside(family), shape_of(family, text)
    default = parsed({"model_type": family.model_types[0]}).to_dict()
    own = {key: value for key, value in text.items() if key != TIES}
    config: dict[str, Any] = {"model_type": family.model_types[0], TIES: text[TIES], inside.key: own}
    config |= {key: sizes["vocab_size"] - 1 - i for i, key in enumerate(_marks(default))}
    config |= {key: IMAGE_TOKENS for key in default if key == "mm_tokens_per_image"}
    config["vision_config"] = {key: TOWER.get(key, value) for key, value in default["vision_config"].items()}
    return _following(family, config)


def _following(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The config with the text model's sizes where another part's repeats them."""
    sizes = shape_of(family, text_config(family, config))
    for key, size in _inside(family).follows.items():
        part, _, name = key.partition(".")
        config[part][name] = sizes[size]
    return config


def _marks(config: Mapping[str, Any]) -> list[str]:
    """The keys that name tokens which stand for something else than text."""
    return [key for key, value in config.items() if key.endswith(("_token_id", "_token_index")) and value is not None]


def _names(whole: Whole) -> set[str]:
    return {name for name, _ in whole.model.named_parameters()}


def _inside(family: Family) -> Inside:
    assert family.inside is not None, family.name
    return family.inside
