"""What one check of one small model came to."""

from collections.abc import Iterable
from dataclasses import dataclass

# Of the largest logit, in fp32: what rounding leaves. The same for every family; where it fails, a term is missing.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Finding:
    """`check` is the property, `of` the axes it was tried on (empty: the family as a whole), `config` the small model.

    `error` is relative to the largest value compared, and None where the claim is exact: then `why` says what is wrong.
    """

    check: str
    config: str
    of: tuple[str, ...] = ()
    error: float | None = None
    tolerance: float = TOLERANCE
    why: str = ""

    @property
    def held(self) -> bool:
        # Not "error > tolerance": a NaN holds nothing.
        return not self.why and (self.error is None or self.error <= self.tolerance)

    def __str__(self) -> str:
        where = f"{self.check}, {self.config}" + (f", {'+'.join(self.of)}" if self.of else "")
        said = f": {self.why}" if self.why else ""
        return f"{where}{said}" + (
            f": {self.error:.2e} (at most {self.tolerance:.0e})" if self.error is not None else ""
        )


class Broken(AssertionError):
    """Claims that did not hold, each with what was measured."""

    def __init__(self, findings: Iterable[Finding]):
        self.findings = tuple(findings)
        super().__init__("\n".join(map(str, self.findings)))


def require(findings: Iterable[Finding]) -> None:
    """Raises Broken for those that did not hold, and for an empty list, which claims nothing."""
    found = list(findings)
    if not found:
        raise Broken([Finding("any", "none", why="nothing was checked")])
    broken = [finding for finding in found if not finding.held]
    if broken:
        raise Broken(broken)
