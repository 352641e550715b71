import pytest

from shearling.arch import families
from shearling.axes.axis import AXES, MASKABLE, Dim, mask_shape
from shearling.axes.factors import Factor, factors
from shearling.axes.spec import Family, Normalisation
from shearling.axes.table import Tensor

TABLE = """
    embedding
    embed  embed.weight                vocab   hidden
    block
    norm   blocks.*.first.weight       hidden
    read   blocks.*.qkv.weight kv_head*group*rotary+kv_head*rotary+kv_head*head_dim hidden bias=qkv_bias disk=h.*.c_attn
    norm   blocks.*.q_norm.weight      rotary
    write  blocks.*.out.weight         hidden  kv_head*group*head_dim  bias=always
    norm   blocks.*.second.weight      hidden
    read   blocks.*.up.weight          intermediate  hidden
    write  blocks.*.down.weight        hidden  intermediate
    head
    norm   last.weight                 hidden
    head   head.weight                 vocab   hidden  tied=embed.weight
"""
NORMS = Normalisation(eps_attribute="eps", eps_key="eps")
DEFAULTS = {
    "qkv_bias": False,
    "tie_word_embeddings": False,
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "hidden_size / num_attention_heads",
    "eps": 1e-6,
}


def family(table: str = TABLE, **options) -> Family:
    options = {"defaults": DEFAULTS, **options}
    return Family("Made up", ("made_up",), table, NORMS, cache="2*kv_head*head_dim", scores="kv_head", **options)


def row(name: str, made: Family | None = None) -> Tensor:
    return next(tensor for tensor in (made or family()).tensors if tensor.name == name)


def names(tensors) -> list[str]:
    return [tensor.name for tensor in tensors]


class TestDim:
    def test_a_sum_of_products(self):
        dim = Dim.parse("kv_head*group*head_dim + 2*kv_head*head_dim")
        assert dim.products == (("kv_head", "group", "head_dim"), (2, "kv_head", "head_dim"))
        assert dim.size({"kv_head": 3, "group": 5, "head_dim": 7}) == 3 * 5 * 7 + 2 * 3 * 7
        assert dim.axes() == ("kv_head", "group", "head_dim")

    @pytest.mark.parametrize("text", ["hidden", "2*kv_head*head_dim", "kv_head*group + intermediate", "64"])
    def test_text_round_trip(self, text):
        assert str(Dim.parse(text)) == text
        assert Dim.parse(str(Dim.parse(text))) == Dim.parse(text)

    @pytest.mark.parametrize("text", ["hiden", "kv_head*", "", "kv_head**group", "-2*hidden", "2.5*hidden", "hidden+"])
    def test_a_word_that_is_no_axis(self, text):
        with pytest.raises(ValueError, match=r"is not an axis; axes: vocab, hidden, layer, kv_head, group, head_dim"):
            Dim.parse(text)

    def test_masks_nest_as_their_axes_lie(self):
        sizes = {"vocab": 2, "hidden": 3, "layer": 5, "kv_head": 7, "group": 11, "head_dim": 13, "intermediate": 17}
        sizes |= {"rotary": 13, "expert": 19, "moe_intermediate": 23, "shared_intermediate": 29}
        shapes = {axis: mask_shape(axis, sizes) for axis in MASKABLE}
        assert shapes == {
            "hidden": (3,),
            "layer": (5,),
            "kv_head": (5, 7),
            "group": (5, 7, 11),
            "head_dim": (5, 7, 13),
            "rotary": (13,),
            "intermediate": (5, 17),
            "expert": (5, 19),
            "moe_intermediate": (5, 19, 23),
            "shared_intermediate": (5, 29),
        }

    def test_an_axis_comes_after_those_it_lies_within(self):
        """select() chooses in AXES' order."""
        order = list(AXES)
        for axis in AXES.values():
            assert all(order.index(outer) < order.index(axis.name) for outer in axis.within)


class TestTable:
    def test_rows_in_order_with_their_biases(self):
        assert names(family().tensors) == [
            "embed.weight",
            "blocks.*.first.weight",
            "blocks.*.qkv.weight",
            "blocks.*.qkv.bias",
            "blocks.*.q_norm.weight",
            "blocks.*.out.weight",
            "blocks.*.out.bias",
            "blocks.*.second.weight",
            "blocks.*.up.weight",
            "blocks.*.down.weight",
            "last.weight",
            "head.weight",
        ]

    def test_groups(self):
        assert {tensor.group for tensor in family().tensors} == {"embedding", "block", "head"}
        assert row("blocks.*.qkv.bias").group == "block"
        assert row("last.weight").group == "head"

    def test_a_bias_has_its_weights_first_dim_and_role(self):
        weight, bias = row("blocks.*.qkv.weight"), row("blocks.*.qkv.bias")
        assert bias.dims == weight.dims[:1]
        assert (bias.role, bias.when, weight.when) == ("read", ("qkv_bias",), ())
        assert row("blocks.*.out.bias").when == ()

    def test_names_of_a_layer(self):
        qkv, head = row("blocks.*.qkv.weight"), row("head.weight")
        assert (qkv.per_layer, head.per_layer) == (True, False)
        assert qkv.at(7) == "blocks.7.qkv.weight"
        assert qkv.at_disk(7) == "h.7.c_attn"
        assert head.at(None) == head.at_disk(None) == "head.weight"
        assert family().block(7) == "blocks.7"

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("reads x.weight hidden", "reads x.weight hidden"),
            ("read x.weight", "read x.weight"),
            ("read x.weight bias=always", "read x.weight bias=always"),
            ("read x.weight hidden biass=always", "read x.weight hidden biass=always"),
        ],
    )
    def test_a_line_that_cant_be_read(self, line, found):
        with pytest.raises(ValueError, match="a table's line is: role name dim") as error:
            family(f"block\n{line}")
        assert f"found {found!r}" in str(error.value)
        assert "('embed', 'norm', 'read', 'write', 'head', 'post', 'route', 'inner', 'join')" in str(error.value)

    def test_a_dim_that_cant_be_read(self):
        with pytest.raises(ValueError, match="'hiden' is not an axis"):
            family("read x.weight hiden")

    def test_readers_read_through_the_norm_above(self):
        assert names(family().readers("blocks.*.first.weight")) == ["blocks.*.qkv.weight"]
        assert names(family().readers("blocks.*.second.weight")) == ["blocks.*.up.weight"]
        assert names(family().readers("last.weight")) == ["head.weight"]
        # A head's own norm is no norm of the residual stream.
        assert family().readers("blocks.*.q_norm.weight") == ()
        assert row("blocks.*.out.weight").norm == row("blocks.*.down.weight").norm == ""

    def test_roles(self):
        assert names(family().role("write")) == ["blocks.*.out.weight", "blocks.*.out.bias", "blocks.*.down.weight"]
        assert names(family().role("embed")) == ["embed.weight"]

    def test_named_goes_layer_by_layer(self):
        found = [(tensor.name, layer) for tensor, layer in family().named({"num_hidden_layers": 2, "qkv_bias": True})]
        block = [tensor.name for tensor in family().tensors if tensor.per_layer]
        expected = [("embed.weight", None), *((name, layer) for layer in (0, 1) for name in block)]
        assert found == [*expected, ("last.weight", None), ("head.weight", None)]
        assert [tensor.name for tensor, _ in family().named({"num_hidden_layers": 0})] == [
            "embed.weight",
            "last.weight",
            "head.weight",
        ]


class TestPresent:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("biases", [False, True])
    def test_under_flags(self, biases, tied):
        made = family()
        found = set(names(made.present({"qkv_bias": biases, "tie_word_embeddings": tied})))
        absent = set(names(made.tensors)) - found
        assert absent == ({"head.weight"} if tied else set()) | (set() if biases else {"blocks.*.qkv.bias"})

    def test_flags_left_out_take_the_defaults(self):
        assert family().present({}) == family().present({"qkv_bias": False, "tie_word_embeddings": False})
        made = family(defaults={**DEFAULTS, "qkv_bias": True, "tie_word_embeddings": True})
        assert made.present({}) == made.present({"qkv_bias": True, "tie_word_embeddings": True})

    def test_an_unknown_flag_is_our_mistake(self):
        with pytest.raises(KeyError, match="no_such_flag"):
            family("read x.weight hidden bias=no_such_flag").present({})


class TestSetting:
    def test_the_configs_own_value(self):
        assert family().setting({"head_dim": 5, "hidden_size": 12, "num_attention_heads": 4}, "head_dim") == 5

    @pytest.mark.parametrize("config", [{}, {"num_key_value_heads": None, "head_dim": None}])
    def test_defaults_that_follow_other_sizes(self, config):
        config = {**config, "hidden_size": 12, "num_attention_heads": 4}
        assert family().setting(config, "num_key_value_heads") == 4
        assert family().setting(config, "head_dim") == 3

    def test_a_ratio_is_rounded_down_as_config_classes_do(self):
        found = family().setting({"hidden_size": 14, "num_attention_heads": 4}, "head_dim")
        assert (found, type(found)) == (3, int)

    def test_plain_defaults(self):
        assert family().setting({}, "eps") == 1e-6
        assert family().setting({"qkv_bias": True}, "qkv_bias") is True

    def test_null_may_mean_something_else_than_absence(self):
        made = family(
            defaults={**DEFAULTS, "num_key_value_heads": 32}, nulls={"num_key_value_heads": "num_attention_heads"}
        )
        assert made.setting({"num_attention_heads": 4}, "num_key_value_heads") == 32
        assert made.setting({"num_attention_heads": 4, "num_key_value_heads": None}, "num_key_value_heads") == 4
        assert made.setting({"num_attention_heads": 4, "num_key_value_heads": 2}, "num_key_value_heads") == 2

    def test_neither_value_nor_default(self):
        with pytest.raises(KeyError, match="hidden_size"):
            family().setting({}, "hidden_size")
        with pytest.raises(KeyError, match="num_attention_heads"):
            family().setting({}, "num_key_value_heads")


COUNT = Factor("hidden", dim=0, part="count", when="masked")
RESIDUAL = (Factor("hidden", dim=0), Factor("layer", dim=None))


class TestFactors:
    def test_untied(self):
        found = {tensor.name: some for tensor, some in factors(family(), tied=False).items()}
        assert found == {
            "embed.weight": (Factor("hidden", dim=1, output=True),),
            "blocks.*.first.weight": (COUNT,),
            "blocks.*.qkv.weight": (Factor("rotary", 0, "support", when="masked"),),
            "blocks.*.qkv.bias": (Factor("rotary", 0, "support", when="masked"),),
            "blocks.*.q_norm.weight": (
                Factor("rotary", 0, "count", when="masked"),
                Factor("rotary", 0, "count", power=0.5, when="cut"),
            ),
            "blocks.*.second.weight": (COUNT,),
            "blocks.*.out.weight": (*RESIDUAL, *(Factor(axis, dim=1) for axis in ("kv_head", "group", "head_dim"))),
            "blocks.*.out.bias": RESIDUAL,
            "blocks.*.down.weight": (*RESIDUAL, Factor("intermediate", dim=1)),
            "last.weight": (COUNT,),
        }

    def test_tied_the_last_norm_takes_the_mask_back_at_the_cut(self):
        plain, tied = factors(family(), tied=False), factors(family(), tied=True)
        last = row("last.weight")
        assert tied[last] == (COUNT, Factor("hidden", dim=0, power=-1, when="cut"))
        assert {t: f for t, f in tied.items() if t != last} == {t: f for t, f in plain.items() if t != last}

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("made", families(), ids=lambda made: made.name)
    def test_every_family_masks_each_axis_once_along_each_path(self, made, tied):
        found = factors(made, tied=tied)
        soft = {t: [f for f in some if f.part == "soft" and f.power > 0] for t, some in found.items()}
        for number, tensor in enumerate(made.tensors):
            axes = sorted(factor.axis for factor in soft.get(tensor, []))
            assert len(axes) == len(set(axes)), tensor.name
            if tensor.role == "write":
                below = next((t.role for t in made.tensors[number + 1 :] if not t.is_bias), "")
                outer = set() if below == "post" else {"hidden", "layer"}
                inner = () if tensor.input is None else tensor.dims[tensor.input].axes()
                inner = (*inner, "expert") if tensor.stacked else inner  # whose own weight routing has while masked
                assert set(axes) == outer | {axis for axis in inner if axis in MASKABLE}
            elif tensor.role == "post":
                assert axes == ["hidden", "layer"]
            elif tensor.role == "embed":
                assert axes == ["hidden"]
            else:
                assert axes == [], f"{tensor.name} is read, so what feeds it has the mask already"
        for axis in made.axes.intersection(MASKABLE) - {"rotary"}:  # of which only the support counts
            assert any(factor.axis == axis for some in soft.values() for factor in some)

    @pytest.mark.parametrize("made", families(), ids=lambda made: made.name)
    def test_norms_count_along_what_they_run_over(self, made):
        found = factors(made, tied=False)
        for tensor in made.role("norm"):
            counts = [factor for factor in found.get(tensor, ()) if factor.part == "count"]
            over = () if tensor.is_bias else (axis for axis in tensor.dims[0].axes() if axis in MASKABLE)
            assert [f for f in counts if f.when == "masked"] == [
                Factor(axis, dim=0, part="count", when="masked") for axis in over
            ]

    @pytest.mark.parametrize("made", families(), ids=lambda made: made.name)
    def test_factors_lie_on_a_dim_that_has_their_axis(self, made):
        for tensor, some in factors(made, tied=True).items():
            for factor in some:
                assert factor.dim is None or factor.axis in tensor.dims[factor.dim].axes()


CENTRED = """
    embed  wte.weight          vocab              hidden
    embed  wpe.weight          positions          hidden  scaled=hidden
    norm   h.*.ln.weight       hidden             bias=always
    read   h.*.c_attn.weight   hidden             3*kv_head*head_dim  bias=always
    norm   h.*.all.weight      3*kv_head*head_dim
    write  h.*.c_proj.weight   kv_head*head_dim   hidden  bias=always
    write  h.*.down.weight     hidden             intermediate  bias=always
    post   h.*.after.weight    hidden
"""


class TestTerms:
    def made(self) -> dict[str, tuple[Factor, ...]]:
        norms = Normalisation(eps_attribute="eps", eps_key="eps", centred=True)
        made = Family("Made up", ("x",), CENTRED, norms, cache="1", scores="1", fixed={"positions": "n_positions"})
        return {tensor.name: some for tensor, some in factors(made, tied=False).items()}

    def test_a_transposed_weight_takes_its_factors_where_its_dims_are(self):
        centre = Factor("hidden", 1, "centre", when="masked")
        assert self.made()["h.*.c_proj.weight"] == (
            Factor("hidden", 1),
            Factor("layer", None),
            centre,
            Factor("kv_head", 0),
            Factor("head_dim", 0),
        )

    def test_every_writer_of_a_centred_family_is_centred(self):
        found = self.made()
        assert Factor("hidden", 0, "centre", when="masked") in found["h.*.c_proj.bias"]
        assert Factor("hidden", 1, "centre", when="masked", output=True) in found["wte.weight"]

    def test_a_bias_of_a_norm_takes_the_support_and_no_count(self):
        assert self.made()["h.*.ln.bias"] == (Factor("hidden", 0, "support", when="masked"),)

    def test_what_goes_into_a_norm_over_heads_takes_the_support(self):
        for name, dim, part in (
            ("c_attn.weight", 1, "support"),
            ("c_attn.bias", 0, "support"),
            ("all.weight", 0, "count"),
        ):
            over = ("kv_head", "head_dim")
            assert self.made()[f"h.*.{name}"] == tuple(Factor(axis, dim, part, when="masked") for axis in over)

    def test_before_a_post_norm_only_the_support_and_on_it_the_soft_mask(self):
        found = self.made()
        support = Factor("hidden", 0, "support", when="masked")
        assert found["h.*.down.weight"] == (support, Factor("intermediate", 1))
        assert found["h.*.down.bias"] == (support,)
        assert found["h.*.after.weight"] == (Factor("hidden", 0), Factor("layer", None), COUNT)

    def test_a_scaled_embedding_is_made_good_at_the_cut(self):
        assert Factor("hidden", None, "count", power=-1, when="cut") in self.made()["wpe.weight"]
