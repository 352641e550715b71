"""Pages and figures: whole, self-contained, escaped, the same for the same input."""

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from shearling.errors import UserError
from shearling.record import Record
from shearling.report.figures import SORT_ABOVE, kept_by_layer, loss_curves, masks_by_layer
from shearling.report.page import figure, heading, page, sample, table, text
from shearling.report.run_page import held_out_series, mask_parts, shape_table, training_series, write_run_page

HOSTILE = "<script>alert('$x$')</script>"
VOID = {"meta", "br", "img", "link", "input", "hr"}
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 300,
    "vocab_size": 512,
}
TARGET = {**SHAPE, "hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 200}
STEPS, TOKENS = 240, 4096


class Tags(HTMLParser):
    """Holds that tags are balanced, and collects tags, attributes and text."""

    def __init__(self, markup: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def check_page(markup: str) -> Tags:
    """Balanced, without scripts, and nothing in it points outside."""
    tags = Tags(markup)
    assert not {"script", "link", "iframe", "object"} & set(tags.tags)
    for name, value in tags.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), value
        assert not name.startswith("on")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", markup))
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in tags.attributes if name.endswith("href") and value.startswith("#")}
    assert used | set(re.findall(r"url\(#([^)]*)\)", markup)) <= set(ids)
    return tags


def losses(value: float) -> dict[str, float]:
    return {"stories": value, HOSTILE: value + 0.5}


def write_prune(folder, *, learned: bool) -> None:
    folder.mkdir()
    noise = random.Random(0)
    record = Record(folder / "record.jsonl")
    settings = {"steps": STEPS, "seq_len": 128, "lr": 3e-4, "proportions": {"stories": 0.75, HOSTILE: 0.25}}
    record.write("prune", target=TARGET, method="masks", versions={"python": "3.11", "torch": "2.10"}, **settings)
    record.write("held_out", step=0, of="source", losses=losses(1.0))
    for step in range(1, STEPS + 1) if learned else ():
        share = step / STEPS
        expected = {"expected_hidden": 64 - 16 * share, "expected_layer": 6 - 2 * share}
        expected["expected_intermediate"] = 300 - 100 * share
        record.write("step", step=step, tokens=step * TOKENS, loss=2 + share + noise.gauss(0, 0.1), **expected)
        if step % 60 == 0 and step < STEPS:
            record.write("held_out", step=step, tokens=step * TOKENS, losses=losses(1 + share))
    if learned:
        wide = [[max(0.0, 1 - i / 200) for i in range(300)] for _ in range(6)]
        record.write("masks", hidden=[1.0] * 48 + [0.0] * 16, layer=[1, 0.9, 0, 0, 0.8, 1], intermediate=wide)
    record.write("held_out", step=STEPS, of="cut", losses=losses(2.25))
    pruned = {"source_parameters": 1_000_000, "parameters": 500_000, "notes": ["a note"]}
    pruned["misses"] = ["layer: 5 open, 4 asked"] if learned else []
    source = {"name": "tiny", "fingerprint": "0", "shape": SHAPE}
    kept = {"layer": [{"within": [], "kept": [0, 1, 4, 5]}]}
    write_origin(folder, {"source": source, "shape": TARGET, "kept": kept, "method": "masks", "pruned": pruned})


def write_heal(folder, origin: dict) -> None:
    folder.mkdir()
    record = Record(folder / "record.jsonl")
    record.write("heal", versions={"python": "3.11"}, steps=2, lr=1e-3)
    record.write("held_out", step=0, of="cut", losses=losses(2.25))
    for step in (1, 2):
        record.write("step", step=step, tokens=step * TOKENS, loss=math.nan if step == 1 else 1.5)
    record.write("held_out", step=2, of="healed", losses=losses(1.25))
    write_origin(folder, {**origin, "healed": {}})


def write_origin(folder, origin: dict) -> None:
    (folder / "shearling.json").write_text(json.dumps(origin))


@pytest.fixture
def folders(tmp_path):
    write_prune(tmp_path / "prune", learned=True)
    write_heal(tmp_path / "heal", json.loads((tmp_path / "prune" / "shearling.json").read_text()))
    return {"prune": tmp_path / "prune", "heal": tmp_path / "heal"}


def test_run_page_tells_all_that_was_recorded(folders, tmp_path):
    out = write_run_page(tmp_path / "report.html", title=f"A run of {HOSTILE}", folders=folders)
    tags = check_page(out.read_text(encoding="utf-8"))
    assert tags.tags.count("svg") == 6  # losses, expected sizes, layers, three masks
    for words in ("hidden_size", "75.0%", "1,000,000", "50.0%", "layer: 5 open, 4 asked", "a note", "0.0003"):
        assert words in tags.words
    for words in ("source", "cut", "healed", "2.2500", "1.7500", "mean of domains", "2.10", "stories 0.75"):
        assert words in tags.words
    for words in ("prune: training", "heal: held out", "heal: training (1 points not finite)", "intermediate"):
        assert words in tags.words
    assert "as heal measured it" not in tags.words  # it found what prune had found
    assert HOSTILE in tags.words


def test_the_same_input_gives_the_same_bytes(folders, tmp_path):
    pages = [write_run_page(tmp_path / f"{i}.html", title="t", folders=folders).read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_a_one_shot_prune_leaves_out_what_it_has_not(tmp_path):
    write_prune(tmp_path / "prune", learned=False)
    out = write_run_page(tmp_path / "report.html", title="t", folders={"prune": tmp_path / "prune"})
    tags = check_page(out.read_text(encoding="utf-8"))
    assert tags.tags.count("svg") == 1  # the layers kept
    assert not any(words in tags.words for words in ("Training", "Masks", "Misses", "healed", "0.0003"))


def test_a_healed_model_of_unknown_origin_has_a_page(tmp_path):
    write_heal(tmp_path / "heal", {})
    out = write_run_page(tmp_path / "report.html", title="t", folders={"heal": tmp_path / "heal"})
    assert check_page(out.read_text(encoding="utf-8")).tags.count("svg") == 1


def test_another_measure_of_the_same_model_has_its_own_column(folders, tmp_path):
    Record(folders["heal"] / "record.jsonl").write("held_out", step=0, of="cut", losses=losses(9.0))
    out = write_run_page(tmp_path / "report.html", title="t", folders=folders)
    assert "cut, as heal measured it" in out.read_text(encoding="utf-8")


def test_a_folder_without_shearling_json_is_named(folders, tmp_path):
    (folders["heal"] / "shearling.json").unlink()
    with pytest.raises(UserError, match=r"heal/shearling\.json.*finished stage"):
        write_run_page(tmp_path / "report.html", title="t", folders=folders)


def test_series_place_every_loss_at_its_tokens():
    events = [
        {"event": "held_out", "step": 0, "losses": {"a": 1.0, "b": 3.0}},
        {"event": "step", "step": 10, "tokens": 100, "loss": "nan"},
        {"event": "held_out", "step": 10, "of": "cut", "losses": {"a": 2.0}},
    ]
    assert held_out_series(events) == [(0, 2.0), (100, 2.0)]
    ((tokens, loss),) = training_series(events)
    assert tokens == 100
    assert math.isnan(loss)


def test_shapes_show_the_share_kept():
    words = Tags(shape_table({"hidden_size": 64}, {"hidden_size": 48})).words
    assert all(cell in words for cell in ("hidden_size", "64", "48", "75.0%"))


def test_parts_escape_what_they_are_given():
    parts = [heading(HOSTILE), text(HOSTILE), table([HOSTILE], [[HOSTILE]]), figure("<svg></svg>", HOSTILE)]
    tags = check_page(page(HOSTILE, [*parts, sample(HOSTILE, f"a\n{HOSTILE}")]))
    assert tags.words.count(HOSTILE) == 9


def test_tables_set_numbers_to_the_right_and_light_up_a_row():
    markup = table(["name", "loss", "note"], [["a", 1.23456, "5 of 6"], ["b", float("nan"), ""]], highlight=1)
    assert '<tr><td>a</td><td class="n">1.2346</td><td>5 of 6</td></tr>' in markup
    assert '<tr class="lit"><td>b</td><td class="n">nan</td><td></td></tr>' in markup


def test_curves_keep_hostile_labels_as_text_and_smooth_long_series():
    labels = ["_private", "$half", "損失", HOSTILE]
    svg = loss_curves({label: [(0, 1.0), (1, 2.0)] for label in labels}, x_label="step", y_label="loss", title="T")
    tags = check_page(svg)
    assert all(label in tags.words for label in (*labels, "step", "loss", "T"))
    noisy = {"long": [(float(i), float(i % 2)) for i in range(400)]}
    assert "opacity: 0.25" in loss_curves(noisy, x_label="x", y_label="y")


def test_heat_maps_sort_wide_rows_and_say_so():
    narrow = masks_by_layer([[[1, 0], [0.5, 1]], [[0, 0], [1, 1]]], title="group")
    wide = masks_by_layer([i / SORT_ABOVE for i in range(SORT_ABOVE + 1)], title="hidden")
    assert "sorted" not in narrow
    assert "sorted from high to low" in wide
    assert ("layer" in Tags(narrow).words, "layer" in Tags(wide).words) == (True, False)
    check_page(narrow + wide)


def test_figures_in_one_page_share_no_id():
    check_page(page("t", [kept_by_layer([0, 2], 4), kept_by_layer([1, 2], 4), kept_by_layer([1], 4, title="T")]))


def test_masks_are_drawn_an_axis_each():
    assert len(mask_parts([{"event": "masks", "time": "now", "hidden": [1.0, 0.0], "layer": [1.0]}])) == 3
    assert mask_parts([{"event": "step", "step": 1}]) == []


def test_the_room_loads_neither_torch_nor_transformers_nor_pictures_before_it_draws():
    code = (
        "import sys, shearling.report.run_page as p; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
