import pytest
import torch
from small_models import small, tokens

from shearling.errors import UserError
from shearling.loss.cross_entropy import hidden_states
from shearling.loss.streams import Alignment, Weights, in_order, outputs_of, stream_loss


def test_alignment_follows_what_was_kept() -> None:
    made = small("llama")
    kept = {"hidden": [{"within": [], "kept": [0, 3]}], "layer": [{"within": [], "kept": [0, 2]}]}
    found = Alignment.of(kept, made.family, layers=2)
    assert found.student == ("model.layers.0", "model.layers.1")
    assert found.source == ("model.layers.0", "model.layers.2")
    assert found.channels == (0, 3)
    whole = Alignment.of({}, made.family, layers=3)
    assert (whole.student, whole.channels) == (whole.source, None)


def test_outputs_are_the_residual_stream() -> None:
    made = small("qwen3")
    ids = tokens(40)
    paths = [made.family.block(layer) for layer in range(3)]
    with torch.no_grad():
        expected = made.model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        with outputs_of(made.model, paths) as seen:
            final = hidden_states(made.model, ids)
        streams = in_order(seen, paths)
        assert torch.equal(streams[0], expected[1])
        assert torch.equal(made.model.base_model.norm(streams[-1]), final)
        with outputs_of(made.model, paths[:1], channels=torch.tensor([2, 5])) as seen:
            hidden_states(made.model, ids)
        assert torch.equal(seen[paths[0]], streams[0][..., [2, 5]])
        seen.clear()
        hidden_states(made.model, ids)
    assert not seen


def test_a_layer_that_was_not_seen_is_said() -> None:
    with pytest.raises(UserError, match=r"no output of model\.layers\.1"):
        in_order({"model.layers.0": torch.zeros(1)}, ["model.layers.0", "model.layers.1"])


def test_stream_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    mine = [torch.randn(2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    theirs = [torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = stream_loss(mine, theirs)
    ratios = [((m - t) ** 2).sum(-1) / (t**2).sum(-1) for m, t in zip(mine, theirs, strict=True)]
    torch.testing.assert_close(found, torch.stack(ratios).mean(0))
    assert float(stream_loss(theirs, theirs).sum()) == 0
    assert torch.isfinite(stream_loss(mine, [torch.zeros_like(t) for t in theirs])).all()


def test_weights_of_masks() -> None:
    """Against the formula in float64, on the way; and with masks of 0 and 1 it is the cut's own figure."""
    generator = torch.Generator().manual_seed(1)
    mine, theirs = (
        [torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(2)
    )
    hidden, layer = (torch.rand(n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (7, 3))
    weights = Weights.of_masks({"hidden": hidden, "layer": layer, "group": torch.ones(1)})
    assert weights.channels is not None
    assert not weights.channels.requires_grad  # closing what is far off must not pay
    ratios = [((m - t) ** 2 * hidden).sum(-1) / (t**2 * hidden).sum(-1) for m, t in zip(mine, theirs, strict=True)]
    expected = sum(share * ratio for share, ratio in zip(layer / layer.sum(), ratios, strict=True))
    torch.testing.assert_close(stream_loss(mine, theirs, weights), expected.detach())

    channels, layers = [0, 3, 4], [0, 2]
    shut = {"hidden": torch.zeros(7), "layer": torch.zeros(3)}
    shut["hidden"][channels], shut["layer"][layers] = 1, 1
    cut = stream_loss(*([stream[i][..., channels] for i in layers] for stream in (mine, theirs)))
    torch.testing.assert_close(stream_loss(mine, theirs, Weights.of_masks(shut)), cut)
    assert torch.equal(stream_loss(mine, theirs, Weights.of_masks({})), stream_loss(mine, theirs))
