"""Extents seen at several sizes, explained as a dim: a sum of products of axes and constants, or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, permutations

Monomials = tuple[tuple[int, tuple[str, ...]], ...]  # (coefficient, words): their products' sum is the extent

SPARE = 2  # samples beyond those that a fit needs: what it must foretell


def fit(samples: Sequence[Mapping[str, int]], extents: Sequence[int], words: Sequence[str]) -> Monomials | None:
    """The simplest sum of products of `words` that is each sample's extent; None where there is none.

    `samples` give the words' sizes. No word comes twice in a product; coefficients are whole numbers above 0. A sum
    counts as found if it foretells at least SPARE samples more than it has unknowns.
    """
    for count in range(min(len(words), 4) + 1):
        for chosen in combinations(words, count):
            products = [product for size in range(count, -1, -1) for product in combinations(chosen, size)]
            if len(samples) < len(products) + SPARE:
                continue
            found = _solve([[_value(product, sample) for product in products] for sample in samples], extents)
            if found is not None and all(c.denominator == 1 and c >= 0 for c in found):
                pairs = zip(found, products, strict=True)
                return tuple((int(c), product) for c, product in pairs if c)
    return None


def layouts(monomials: Monomials) -> Iterator[str]:
    """The dims, as a table writes them, that such a sum may be laid out as in memory; the usual ones first."""
    terms = [[(c, words)] if c == 1 or len(monomials) == 1 else [(1, words)] * c for c, words in monomials]
    flat = [term for group in terms for term in group]
    if len(flat) == 1:
        coefficient, words = flat[0]
        yield from dict.fromkeys(_with_constant(coefficient, words))
        return
    if len(flat) > 4:
        flat = list(monomials)
    seen = dict.fromkeys(permutations(sorted(flat, key=lambda term: -len(term[1]))))
    yield from (" + ".join(next(_with_constant(c, words)) for c, words in order).replace(" ", "") for order in seen)


def _with_constant(coefficient: int, words: tuple[str, ...]) -> Iterator[str]:
    if coefficient == 1 and words:
        yield "*".join(words)
        return
    for place in range(len(words) + 1):
        yield "*".join((*words[:place], str(coefficient), *words[place:]))


def _value(product: tuple[str, ...], sample: Mapping[str, int]) -> int:
    value = 1
    for word in product:
        value *= sample[word]
    return value


def _solve(rows: list[list[int]], values: Sequence[int]) -> list[Fraction] | None:
    """The one solution of an overdetermined system, exactly; None where there is none, or more than one."""
    matrix = [[Fraction(x) for x in (*row, value)] for row, value in zip(rows, values, strict=True)]
    unknowns = len(rows[0])
    for column in range(unknowns):
        pivot = next((r for r in range(column, len(matrix)) if matrix[r][column]), None)
        if pivot is None:
            return None
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        lead = matrix[column][column]
        matrix[column] = [x / lead for x in matrix[column]]
        for r, row in enumerate(matrix):
            if r != column and row[column]:
                factor = row[column]
                matrix[r] = [x - factor * y for x, y in zip(row, matrix[column], strict=True)]
    if any(row[-1] for row in matrix[unknowns:]):
        return None
    return [matrix[i][-1] for i in range(unknowns)]
