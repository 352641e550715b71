"""Where rows lie in files."""

import pytest

from shearling.axes.disk import pieces
from shearling.axes.table import rows

SIZES = {"expert": 2, "moe_intermediate": 3, "hidden": 4, "kv_head": 2, "head_dim": 5}


def test_a_row_without_a_name_of_its_own_is_one_piece() -> None:
    (row,) = rows("write l.*.o hidden kv_head*head_dim")
    (piece,) = pieces(row, 7, SIZES)
    assert (piece.name, piece.shape) == ("l.7.o", (4, 10))


def test_listed_experts_and_concatenated_halves() -> None:
    (row,) = rows("read l.*.gate_up expert 2*moe_intermediate hidden disk=l.*.e.#.w1+l.*.e.#.w3")
    found = {piece.name: (piece.shape, piece.where) for piece in pieces(row, 0, SIZES)}
    assert list(found) == ["l.0.e.0.w1", "l.0.e.1.w1", "l.0.e.0.w3", "l.0.e.1.w3"]
    assert found["l.0.e.1.w3"] == ((3, 4), (1, slice(3, 6), slice(0, 4)))


def test_a_piece_for_each_product_of_a_sum() -> None:
    (row,) = rows("read l.qkv kv_head*head_dim+head_dim hidden disk=l.q+l.k")
    assert [piece.shape for piece in pieces(row, None, SIZES)] == [(10, 4), (5, 4)]


def test_names_that_no_dim_has_parts_for() -> None:
    (row,) = rows("read l.x hidden kv_head disk=a+b")
    with pytest.raises(ValueError, match="2 names"):
        list(pieces(row, None, SIZES))
