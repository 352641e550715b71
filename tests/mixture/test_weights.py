"""The mixture's update: worked by hand, and what holds whatever the losses are."""

import random
from math import exp, inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.errors import UserError
from shearling.mixture.options import RULES, Options
from shearling.mixture.steering import Steered
from shearling.mixture.weights import Mixture, Rule, bounded, check_weights, updated

START = {"a": 0.5, "b": 0.3, "c": 0.2}
REFERENCES = {"a": 2.0, "b": 1.0, "c": 3.0}
# Excesses of three updates: (.4, 0, .1), then (.2, 0, .3), then (0, 0, .6); b is below its reference throughout.
LOSSES = ({"a": 2.4, "b": 0.9, "c": 3.1}, {"a": 2.2, "b": 0.8, "c": 3.3}, {"a": 1.9, "b": 0.7, "c": 3.6})
FREE = {"floor": 0.0, "cap": 1e9}


def after(rule: Rule, losses=LOSSES, mixture: Mixture | None = None) -> list[Mixture]:
    found = [mixture or Mixture.starting(START)]
    for each in losses:
        found.append(updated(found[-1], rule, losses=each, references=REFERENCES)[0])
    return found[1:]


def normalised(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {domain: weight / total for domain, weight in weights.items()}


def test_the_papers_rule_by_hand():
    """It accumulates: after three updates a has e^.6, b nothing, c e^1.0."""
    one, two, three = after(Rule("paper", 1.0, 0.0, **FREE))
    assert one.weights == pytest.approx(normalised({"a": 0.5 * exp(0.4), "b": 0.3, "c": 0.2 * exp(0.1)}))
    assert one.weights == pytest.approx({"a": 0.58875, "b": 0.23679, "c": 0.17446}, abs=1e-5)
    assert two.weights == pytest.approx(normalised({"a": 0.5 * exp(0.6), "b": 0.3, "c": 0.2 * exp(0.4)}))
    assert three.weights == pytest.approx(normalised({"a": 0.5 * exp(0.6), "b": 0.3, "c": 0.2 * exp(1.0)}))


def test_the_anchored_rule_by_hand():
    """Half of the old excess: a .4, .3, .15; c .1, .2, .4; always from the start, with eta 2."""
    one, two, three = after(Rule("anchored", 2.0, 0.5, **FREE))
    assert one.excess == pytest.approx({"a": 0.4, "b": 0.0, "c": 0.1})
    assert one.weights == pytest.approx(normalised({"a": 0.5 * exp(0.8), "b": 0.3, "c": 0.2 * exp(0.2)}))
    assert two.excess == pytest.approx({"a": 0.3, "b": 0.0, "c": 0.2})
    assert two.weights == pytest.approx(normalised({"a": 0.5 * exp(0.6), "b": 0.3, "c": 0.2 * exp(0.4)}))
    assert three.excess == pytest.approx({"a": 0.15, "b": 0.0, "c": 0.4})
    assert three.weights == pytest.approx(normalised({"a": 0.5 * exp(0.3), "b": 0.3, "c": 0.2 * exp(0.8)}))


def test_bounds_by_hand():
    """a would have .9: it stays at its cap .6, b at its floor .1, and c takes what is left."""
    found = bounded(
        {"a": 0.9, "b": 0.02, "c": 0.08}, floors={"a": 0.1, "b": 0.1, "c": 0.1}, caps={"a": 0.6, "b": 1.0, "c": 1.0}
    )
    assert found == pytest.approx({"a": 0.6, "b": 0.1, "c": 0.3})
    found = bounded({"a": 0.5, "b": 0.3, "c": 0.2}, floors=dict.fromkeys("abc", 0.0), caps=dict.fromkeys("abc", 1.0))
    assert found == {"a": 0.5, "b": 0.3, "c": 0.2}


names = st.integers(1, 8).map(lambda count: [f"d{number}" for number in range(count)])
rules = st.builds(
    Rule,
    kind=st.sampled_from(["paper", "anchored"]),
    eta=st.floats(0.0, 20.0),
    smoothing=st.floats(0.0, 0.95),
    floor=st.floats(0.0, 0.9),
    cap=st.floats(1.0, 100.0),
)


def cases(draw_losses):
    @st.composite
    def made(draw):
        domains = draw(names)
        shares = [draw(st.floats(1e-4, 1.0)) for _ in domains]
        start = {domain: share / sum(shares) for domain, share in zip(domains, shares, strict=True)}
        references = {domain: draw(st.floats(-5.0, 10.0)) for domain in domains}
        losses = [{domain: draw(draw_losses) for domain in domains} for _ in range(draw(st.integers(1, 4)))]
        return start, references, losses

    return made()


any_loss = st.one_of(st.floats(-50.0, 50.0), st.just(None), st.sampled_from([nan, inf, -inf]), st.floats(0, 1e300))


@settings(max_examples=300)
@given(cases(any_loss), rules)
def test_weights_sum_to_one_within_their_bounds_whatever_the_losses(case, rule):
    start, references, losses = case
    mixture = Mixture.starting(start)
    for each in losses:
        mixture, _ = updated(mixture, rule, losses=each, references=references)
        assert sum(mixture.weights.values()) == pytest.approx(1.0, abs=1e-9)
        for domain, weight in mixture.weights.items():
            assert weight >= rule.floor * start[domain] * (1 - 1e-9)
            assert weight <= min(1.0, rule.cap * start[domain]) * (1 + 1e-9)


@settings(max_examples=100)
@given(cases(st.floats(-20.0, 20.0)), rules, st.randoms(use_true_random=False))
def test_the_order_of_domains_changes_nothing(case, rule, shuffle: random.Random):
    start, references, losses = case
    order = list(start)
    shuffle.shuffle(order)
    one, two = Mixture.starting(start), Mixture.starting({domain: start[domain] for domain in order})
    for each in losses:
        one, _ = updated(one, rule, losses=each, references=references)
        two, _ = updated(two, rule, losses={d: each[d] for d in order}, references=references)
    assert one.weights == two.weights


@settings(max_examples=100)
@given(cases(st.just(0.0)), rules, st.floats(0.0, 5.0))
def test_equal_excess_leaves_the_weights_as_they_are(case, rule, excess):
    start, references, updates = case
    mixture = Mixture.starting(start)
    for _ in updates:
        losses = {domain: reference + excess for domain, reference in references.items()}
        mixture, _ = updated(mixture, rule, losses=losses, references=references)
    assert mixture.weights == pytest.approx(start, rel=1e-9)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("missing", [None, nan, inf])
def test_a_domain_without_a_loss_keeps_its_excess(rule, missing):
    (first,) = after(rule, LOSSES[:1])
    second, notes = updated(first, rule, losses={**LOSSES[1], "a": missing}, references=REFERENCES)
    assert second.excess["a"] == first.excess["a"]
    assert second.excess["c"] != first.excess["c"]
    what = "no samples" if missing is None else f"a loss of {missing}"
    assert f"a had {what}: its excess stays as it was" in notes


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_losses_at_all_leave_the_weights(rule):
    (first,) = after(rule, LOSSES[:1])
    second, notes = updated(first, rule, losses={}, references=REFERENCES)
    assert second.weights == first.weights
    assert "no domain had a loss: the weights stay" in notes


def test_a_reference_that_is_never_reached_cannot_take_over():
    """The paper's rule gives a all of the data; the anchored one comes to rest, and both say so."""
    stuck = [{"a": 2.0, "b": 1.0, "c": 9.0}] * 40
    anchored, paper = after(Rule("anchored", cap=2.0), stuck), after(RULES["paper"], stuck)
    assert anchored[-1].weights["c"] == pytest.approx(0.4)
    assert anchored[-1].weights == pytest.approx(anchored[-2].weights)
    assert paper[-1].weights["c"] > 0.99
    _, notes = updated(anchored[-1], Rule("anchored", cap=2.0), losses=stuck[0], references=REFERENCES)
    assert "c is at its cap, 2 times the share it started with" in notes
    _, notes = updated(paper[-1], RULES["paper"], losses=stuck[0], references=REFERENCES)
    assert any(note.startswith("c has 100% of every batch") for note in notes)
    assert "a is at its floor, 0.001 of the share it started with" in notes


def test_what_the_record_says_of_a_change():
    steered = Steered(RULES["anchored"], REFERENCES, "held_out", 10)
    after, said = steered(Mixture.starting(START), {"held_out": LOSSES[0], "loss": {}})
    assert said["weights"] == after.weights != said["before"] == START
    assert said["losses"] == LOSSES[0]
    assert said["notes"][-1] == "a goes from 50.0% to 58.9% of the data: it is 0.400 above its reference"
    _, said = steered(Mixture.starting(START), {"held_out": {d: r - 1 for d, r in REFERENCES.items()}})
    assert said["notes"] == [
        "every domain is at its reference: the mixture is the one it started with",
        "the weights stay as they are",
    ]


def test_a_domain_gains_of_what_another_gives_back_and_the_record_says_so():
    steered = Steered(Rule("anchored", 1.0, 0.0, **FREE), REFERENCES, "held_out", 10)
    first, _ = steered(Mixture.starting(START), {"held_out": {"a": 1.0, "b": 1.0, "c": 5.0}})
    _, said = steered(first, {"held_out": {"a": 1.0, "b": 1.0, "c": 3.5}})
    assert said["notes"][-1].startswith("a goes from ")
    assert said["notes"][-1].endswith("of what c gives back: that is 0.500 above its reference by now")


def test_a_reference_that_was_never_reached_is_mentioned():
    mixture, notes = Mixture.starting(START), ()
    for _ in range(10):
        mixture, notes = updated(
            mixture, RULES["anchored"], losses={"a": 1.9, "b": 1.5, "c": 9.0}, references=REFERENCES
        )
    assert notes[0] == "b, c: never at the reference in 10 updates"
    assert mixture.reached == ("a",)


def test_nothing_new_leaves_the_very_weights():
    start = {"a": 0.1, "b": 0.2, "c": 0.7}
    after, _ = updated(Mixture.starting(start), RULES["anchored"], losses=REFERENCES, references=REFERENCES)
    assert after.weights == start


def test_signals_are_what_the_loop_calls_them():
    assert not Steered(RULES["paper"], {}, "training", 1).wants_held_out
    losses = {"loss": {"a": 2.4, "b": 0.9, "c": 3.1}}
    after, _ = Steered(RULES["paper"], REFERENCES, "training", 1)(Mixture.starting(START), losses)
    assert after.excess == pytest.approx({"a": 0.4, "b": 0.0, "c": 0.1})


def test_bad_weights_are_all_told():
    with pytest.raises(UserError, match=r"(?s)'wikki'.*did you mean 'wiki'.*weight of 'code': found 0.*no weight for"):
        check_weights({"wikki": 0.5, "code": 0.0}, ("wiki", "code"))
    with pytest.raises(UserError, match=r"a sum of 1\.1; expected 1; perhaps wiki=0\.909091, code=0\.0909091"):
        check_weights({"wiki": 1.0, "code": 0.1}, ("wiki", "code"))


def test_options_choose_the_rule():
    assert Options().chosen_rule() == RULES["anchored"]
    assert Options(rule="paper", eta=0.5).chosen_rule() == Rule("paper", 0.5, 0.0, 1e-3, 1e6)
    with pytest.raises(ValueError, match="cap from 1"):
        Options(cap=0.5)
