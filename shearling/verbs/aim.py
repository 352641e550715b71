"""What a mixture is steered towards: references that were given, or else the losses of the model that was sheared."""

from collections.abc import Callable, Mapping

from shearling.data.loader import bytes_per_token
from shearling.errors import UserError
from shearling.mixture.options import Options
from shearling.ranks.ranks import Ranks
from shearling.verbs.reference import load_reference
from shearling.verbs.session import Session
from shearling.verbs.source import Source

CONSTANT = "the mixture stays as it is"


def given(options: Options, session: Session) -> Mapping[str, float] | None:
    """The references that were asked for, in nats per token; None where that is left open. Raises UserError."""
    store = session.feed.store
    if options.reference is None or session.signal is None:
        return None
    return load_reference(
        options.reference,
        domains=store.domains,
        tokenizer=store.fingerprint,
        bytes_per_token=bytes_per_token(store),
    )


def aimed(session: Session, options: Options, own: Callable[[], tuple[Mapping[str, float] | None, str]]) -> Session:
    """The session with its mixture steered, or constant, and a note of why.

    Without references that were given it is `own()`, which says where it has them from or why there are none. Raises
    UserError where a dynamic mixture was asked for and there is nothing to steer it by.
    """
    if session.signal is None:
        return session
    if len(session.settings.domains) == 1:
        return session.towards(None, f"one domain, nothing to mix: {CONSTANT}")
    references = given(options, session)
    if references is not None:
        return session.towards(references, "the mixture follows the references that were given")
    if session.signal == "teacher_kl":
        zeros = dict.fromkeys(session.settings.domains, 0.0)
        return session.towards(zeros, "the mixture follows the KL to the teacher, by domain")
    references, said = own()
    if references is not None:
        return session.towards(references, f"the mixture follows {said}")
    if options.schedule == "dynamic":
        raise UserError(
            "mixture",
            found=f"no references: {said}",
            expected="losses to steer by",
            change="give --reference (`shearling reference` makes one), or --mixture constant",
        )
    return session.towards(None, f"{said}, so {CONSTANT} (--reference gives it something to follow)")


def source_losses(model: Source, session: Session) -> tuple[Mapping[str, float] | None, str]:
    """The losses of the model that `model` was sheared from, on the session's held-out windows, and what they are.

    Those in shearling.json where they are of the same windows, else measured now; None where the source is gone.
    """
    origin = model.origin()
    if origin.get("measured") == session.measured_on():
        return origin["pruned"]["source_losses"], "the source's losses, as shearling.json has them"
    source, why = source_of(model, session.ranks)
    if source is None:
        return None, why
    return session.losses(session.load(source)), f"the losses of {source.name}, measured now"


def source_of(model: Source, ranks: Ranks) -> tuple[Source | None, str]:
    """The model that this one was sheared from, or why it can't be had: on all ranks, if it can't on one."""
    origin = model.origin()
    if "source" not in origin:
        return None, "no shearling.json says what this model was sheared from"
    name, source, why = origin["source"]["name"], None, "another rank says why"
    try:
        source = Source.open(name, dtype="float32", like=model)  # in whatever dtype it says it is
    except UserError as error:
        why = str(error)
    if any(ranks.any(source is None)) or source is None:
        return None, f"its source, {name}, is gone or can't be read ({why})"
    source.identify(ranks)
    if source.fingerprint != origin["source"]["fingerprint"]:
        return None, f"its source, {name}, has changed since"
    return source, ""
