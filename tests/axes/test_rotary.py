"""Which entries of q and k may stay, and what the config then says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.axes.rotary import config_keeping, selections, unturnable, ways

STATED = {"rope_theta": 10000.0}


def frequencies(theta: float, size: int) -> list[float]:
    return [theta ** (-2 * i / size) for i in range(size // 2)]


def test_by_hand() -> None:
    assert list(selections(("prefix", "stride"), 8, 4)) == [(0, 1, 4, 5), (0, 2, 4, 6)]
    assert list(selections(("prefix", "stride"), 8, 6)) == [(0, 1, 2, 4, 5, 6)]
    assert list(selections(("stride",), 8, 6)) == []
    assert list(selections(("prefix", "stride"), 8, 3)) == []


@given(st.integers(1, 64), st.integers(1, 64), st.floats(100, 1e7))
def test_the_frequencies_of_the_config_are_those_of_what_stays(pairs: int, kept: int, theta: float) -> None:
    size, kept = 2 * pairs, 2 * min(kept, pairs)
    before = frequencies(theta, size)
    for chosen in selections(("prefix", "stride"), size, kept):
        assert len(chosen) == kept
        assert [i + pairs for i in chosen[: kept // 2]] == list(chosen[kept // 2 :])
        config = {"rope_theta": theta, **config_keeping({"rope_theta": theta}, chosen, size)}
        after = frequencies(config["rope_theta"], kept)
        assert after == pytest.approx([before[i] for i in chosen[: kept // 2]], rel=1e-9)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 100.0}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_parameters": {"full_attention": {"rope_theta": 1e3}, "sliding_attention": {"rope_theta": 100.0}}},
        ),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4}, {"rope_theta": 1e3, "rope_local_base_freq": 100.0}),
    ],
)
def test_theta_wherever_a_config_has_it(config: dict, expected: dict) -> None:
    assert config_keeping(config, (0, 1, 4, 5), 8) == expected
    assert config_keeping(config, (0, 2, 4, 6), 8) == {}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, ""),
        (STATED, ""),
        ({**STATED, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ""),
        ({**STATED, "rope_scaling": {"type": "linear", "factor": 2.0}}, ""),
        ({**STATED, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "of the type 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "of the type 'longrope'"),
        ({**STATED, "partial_rotary_factor": 0.5}, "only a part"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "only a part"),
    ],
)
def test_what_can_not_be_turned(config: dict, said: str) -> None:
    assert said in unturnable(config)
    assert bool(said) is bool(unturnable(config))


def test_the_first_entries_need_a_theta_that_is_said() -> None:
    assert ways({}) == ("stride",)
    assert ways({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}) == ("prefix", "stride")
