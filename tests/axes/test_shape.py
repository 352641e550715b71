import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.arch import families, family_of
from shearling.axes.shape import KEYS, Shape, parse_target, resolve_target, shape_of
from shearling.errors import UserError, UserErrors

MULTI_HEAD = Shape(
    {
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "intermediate_size": 172,
        "vocab_size": 512,
    }
)
GROUPED = Shape({**MULTI_HEAD, "num_key_value_heads": 4})
LLAMA, MISTRAL = family_of({"model_type": "llama"}), family_of({"model_type": "mistral"})
HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"


def refusal(family, source, wanted) -> UserError:
    with pytest.raises(UserError) as error:
        resolve_target(family, source, wanted)
    return error.value


def each(error: UserError) -> tuple[UserError, ...]:
    return error.errors if isinstance(error, UserErrors) else (error,)


def suggestions(error: UserError) -> list[tuple[str, int]]:
    """The values that an error names: `choose a=1 or 2, or b=3`."""
    assert error.change.startswith("choose ")
    named = re.findall(r"(\w+)=(\d+)(?: or (\d+))?", error.change)
    assert named, error.change
    return [(key, int(value)) for key, *values in named for value in values if value]


class TestShape:
    def test_a_mapping_in_a_fixed_order(self):
        assert list(Shape(dict(reversed(MULTI_HEAD.items())))) == list(KEYS)
        assert len(MULTI_HEAD) == len(KEYS)
        assert dict(Shape(MULTI_HEAD)) == dict(MULTI_HEAD)
        assert hash(Shape(MULTI_HEAD)) == hash(MULTI_HEAD)
        assert Shape(MULTI_HEAD) == MULTI_HEAD != GROUPED

    def test_all_sizes_are_needed(self):
        with pytest.raises(KeyError, match="num_hidden_layers"):
            Shape({"hidden_size": 4})

    def test_text_that_parse_target_takes(self):
        assert parse_target(str(GROUPED)) == dict(GROUPED)

    def test_axes_divide_products_out(self):
        assert GROUPED.axes == {
            "hidden": 64,
            "layer": 5,
            "kv_head": 4,
            "group": 2,
            "head_dim": 8,
            "intermediate": 172,
            "vocab": 512,
        }
        assert all(dim.size(GROUPED.axes) == GROUPED[key] for key, dim in KEYS.items())


class TestShapeOf:
    CONFIG = {**MULTI_HEAD, "model_type": "llama"}

    def test_what_a_config_leaves_out_is_the_familys_default(self):
        config = {key: value for key, value in self.CONFIG.items() if key not in (KV_HEADS, "head_dim")}
        assert shape_of(LLAMA, config) == MULTI_HEAD
        assert shape_of(LLAMA, {**config, "head_dim": None, KV_HEADS: None}) == MULTI_HEAD
        assert shape_of(MISTRAL, {**config, HEADS: 16, "hidden_size": 80})["head_dim"] == 5

    @pytest.mark.parametrize("value", [None, 0, -8, 8.0, "8", True, [8]])
    @pytest.mark.parametrize("key", KEYS)
    def test_sizes_that_arent(self, key, value):
        if value is None and key in (KV_HEADS, "head_dim"):
            return
        with pytest.raises(UserError) as error:
            shape_of(LLAMA, {**self.CONFIG, key: value})
        assert error.value.what == f"config.json: {key}"
        assert error.value.found == repr(value)
        assert error.value.expected == "a whole number above 0"
        assert error.value.change == "mend config.json"

    def test_a_size_that_is_missing(self):
        with pytest.raises(UserError, match="config.json: hidden_size: found None; expected a whole number above 0"):
            shape_of(LLAMA, {"model_type": "llama"})

    def test_heads_that_kv_heads_cant_share(self):
        with pytest.raises(UserError) as error:
            shape_of(LLAMA, {**self.CONFIG, KV_HEADS: 3})
        assert str(error.value) == (
            "config.json: num_attention_heads: found 8, not a multiple of num_key_value_heads=3; expected a multiple; "
            "mend config.json"
        )


class TestParseTarget:
    def test_sizes(self):
        assert parse_target("hidden_size=384,num_hidden_layers=20") == {"hidden_size": 384, "num_hidden_layers": 20}
        assert parse_target(" hidden_size = 384 , ,num_hidden_layers=+20,") == {
            "hidden_size": 384,
            "num_hidden_layers": 20,
        }

    def test_a_number_below_1_is_left_to_the_range(self):
        assert parse_target("hidden_size=-4") == {"hidden_size": -4}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("hiden_size=4", "target: found 'hiden_size'; expected a size of the model; did you mean 'hidden_size'?"),
            ("zzz=4", f"target: found 'zzz'; expected a size of the model; known: {', '.join(KEYS)}"),
            ("=4", f"target: found ''; expected a size of the model; known: {', '.join(KEYS)}"),
            ("hidden_size=4,hidden_size=4", "target: found hidden_size twice; expected each size once; leave one out"),
            ("", "target: found nothing; expected sizes; name what to cut, as hidden_size=N,..."),
            (" , ", "target: found nothing; expected sizes; name what to cut, as hidden_size=N,..."),
        ],
    )
    def test_keys_that_arent(self, text, message):
        with pytest.raises(UserError) as error:
            parse_target(text)
        assert str(error.value) == message

    @pytest.mark.parametrize(
        "value", ["", "4k", "4.0", "--4", "4-", "²", "1_000", "0x10", "4=4", "9" * 5000, "1e3", "-"]
    )
    def test_values_that_arent(self, value):
        with pytest.raises(UserError) as error:
            parse_target(f"hidden_size={value}")
        expected = f"target hidden_size: found {value!r}; expected a whole number; write hidden_size=N"
        assert str(error.value) == expected

    def test_all_mistakes_at_once(self):
        with pytest.raises(UserErrors) as error:
            parse_target("hiden_size=4,head_dim=x,vocab_size=1,vocab_size=2")
        assert [each.what for each in error.value.errors] == ["target", "target head_dim", "target"]

    @given(st.text(max_size=30))
    def test_whatever_it_is_given(self, text):
        try:
            assert all(key in KEYS for key in parse_target(text))
        except UserError as error:
            assert "; expected " in str(error)


class TestResolveTarget:
    @pytest.mark.parametrize("source", [MULTI_HEAD, GROUPED], ids=["multi-head", "grouped"])
    @pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
    def test_the_sources_own_shape(self, family, source):
        assert resolve_target(family, source, {}) == (source, [])
        assert resolve_target(family, source, dict(source)) == (source, [])
        assert resolve_target(family, source, {HEADS: source[HEADS]}) == (source, [])

    def test_what_is_left_out_stays(self):
        target, notes = resolve_target(LLAMA, GROUPED, {"hidden_size": 32, "num_hidden_layers": 1})
        assert (target, notes) == (Shape({**GROUPED, "hidden_size": 32, "num_hidden_layers": 1}), [])

    def test_kv_heads_follow_in_a_multi_head_source(self):
        target, notes = resolve_target(LLAMA, MULTI_HEAD, {HEADS: 4})
        assert target == Shape({**MULTI_HEAD, HEADS: 4, KV_HEADS: 4})
        assert notes == ["num_key_value_heads follows num_attention_heads: 4"]
        assert resolve_target(LLAMA, MULTI_HEAD, {HEADS: 4, KV_HEADS: 4}) == (target, [])

    def test_kv_heads_stay_in_a_grouped_source(self):
        target, notes = resolve_target(LLAMA, GROUPED, {HEADS: 4})
        assert (target, notes) == (Shape({**GROUPED, HEADS: 4}), [])
        assert target.axes["group"] == 1

    @pytest.mark.parametrize("value", [0, -1, 10**6])
    @pytest.mark.parametrize("key", KEYS)
    def test_out_of_range(self, key, value):
        error = refusal(LLAMA, GROUPED, {key: value})
        assert str(error) == (
            f"target {key}: found {value}; expected 1 to {GROUPED[key]}, the source's; choose {key} in that range"
        )

    @pytest.mark.parametrize(
        ("key", "change"),
        [
            ("head_dim", "cutting head_dim is not supported yet: leave it out"),
            ("vocab_size", "cutting the vocabulary is not supported yet: leave it out"),
        ],
    )
    def test_sizes_that_nothing_cuts(self, key, change):
        error = refusal(LLAMA, GROUPED, {key: 7})
        assert str(error) == f"target {key}: found 7; expected {GROUPED[key]}, the source's; {change}"

    def test_all_sizes_out_of_range_at_once(self):
        error = refusal(LLAMA, GROUPED, {"hidden_size": 65, "num_hidden_layers": 0, "head_dim": 4})
        assert [part.what for part in each(error)] == [
            "target hidden_size",
            "target num_hidden_layers",
            "target head_dim",
        ]

    @pytest.mark.parametrize(
        ("source", "wanted", "found", "most", "change"),
        [
            (GROUPED, {HEADS: 6}, "6 with num_key_value_heads=4", 2, f"{HEADS}=4 or 8, or {KV_HEADS}=3"),
            (GROUPED, {HEADS: 2}, "2 with num_key_value_heads=4", 2, f"{HEADS}=4, or {KV_HEADS}=2"),
            (GROUPED, {KV_HEADS: 3}, "8 with num_key_value_heads=3", 2, f"{HEADS}=6, or {KV_HEADS}=4"),
            (GROUPED, {HEADS: 7, KV_HEADS: 2}, "7 with num_key_value_heads=2", 2, f"{HEADS}=4"),
            (MULTI_HEAD, {KV_HEADS: 4}, "8 with num_key_value_heads=4", 1, f"{HEADS}=4, or {KV_HEADS}=8"),
        ],
    )
    def test_heads_that_kv_heads_cant_share(self, source, wanted, found, most, change):
        error = refusal(MISTRAL, source, wanted)
        assert str(error) == (
            f"target {HEADS}: found {found}; expected 1 to {most} heads for each kv head, the same for all; "
            f"choose {change}"
        )

    @pytest.mark.parametrize(
        ("source", "wanted", "found", "change"),
        [
            (GROUPED, {"hidden_size": 60}, "60 with num_attention_heads=8", "hidden_size=56 or 64, or {}=4"),
            (MULTI_HEAD, {"hidden_size": 60}, "60 with num_attention_heads=8", "hidden_size=56 or 64, or {}=6"),
            (MULTI_HEAD, {HEADS: 5}, "64 with num_attention_heads=5", "hidden_size=60, or {}=4 or 8"),
            (GROUPED, {"hidden_size": 61}, "61 with num_attention_heads=8", "hidden_size=56 or 64"),
        ],
    )
    def test_a_hidden_size_that_the_config_class_refuses(self, source, wanted, found, change):
        """6 heads divide a hidden size of 60, but can't share 4 kv heads: it isn't named there."""
        error = refusal(LLAMA, source, wanted)
        assert str(error) == (
            f"target hidden_size: found {found}; expected a multiple of num_attention_heads, which transformers' "
            f"config insists on; choose {change.format(HEADS)}"
        )
        assert resolve_target(MISTRAL, source, wanted)

    def test_a_source_that_is_indivisible_already_may_stay_so(self):
        source = Shape({**GROUPED, "hidden_size": 60})
        assert resolve_target(LLAMA, source, {"intermediate_size": 10})[0]["hidden_size"] == 60
        assert refusal(LLAMA, source, {"hidden_size": 59})

    def test_two_rules_broken_that_no_single_size_mends(self):
        first, second = each(refusal(LLAMA, GROUPED, {"hidden_size": 61, HEADS: 7}))
        assert first.change == f"choose {HEADS}=4 or 8"
        assert second.change == f"choose hidden_size=56 or 63, or {HEADS}=1"

    @given(data=st.data())
    def test_the_values_that_a_message_names_are_accepted(self, data):
        """And they are the nearest: nothing between them and what was asked would be."""
        family = data.draw(st.sampled_from(families()))
        kv_heads, group = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
        heads = kv_heads * group
        hidden = data.draw(st.integers(1, 8)) * heads
        source = Shape({**GROUPED, "hidden_size": hidden, HEADS: heads, KV_HEADS: kv_heads})
        keys = data.draw(st.sets(st.sampled_from(["hidden_size", HEADS, KV_HEADS])))
        wanted = {key: data.draw(st.integers(1, source[key])) for key in sorted(keys)}

        def accepted(key: str, value: int) -> bool:
            try:
                return bool(resolve_target(family, source, {**wanted, key: value}))
            except UserError:
                return False

        try:
            target, _ = resolve_target(family, source, wanted)
        except UserErrors as errors:
            for error in errors.errors:  # each value mends its own rule at least
                for key, value in suggestions(error):
                    try:
                        resolve_target(family, source, {**wanted, key: value})
                    except UserError as still:
                        assert error.expected not in [part.expected for part in each(still)]
        except UserError as error:
            named = suggestions(error)
            for key, value in named:
                assert accepted(key, value)
                asked = wanted.get(key, source[key])
                between = range(min(asked, value) + 1, max(asked, value))
                assert not any(accepted(key, other) for other in between)
        else:
            assert all(1 <= target[key] <= source[key] for key in KEYS)
            assert all(target[key] == value for key, value in wanted.items())
            assert all(target.axes[axis] <= size for axis, size in source.axes.items())
            assert target[HEADS] == target.axes["kv_head"] * target.axes["group"]
            left_out = KEYS.keys() - wanted - ({KV_HEADS} if source.axes["group"] == 1 else set())
            assert all(target[key] == source[key] for key in left_out)
