"""Categories: counts of a column's values as text, exact for what is kept, and mergeable exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchnorm.errors import ArgumentError

MOST_CATEGORIES = 4096
"""Categories that are kept at most; beyond that, those with the smallest hashes."""

_ALL = 64


@dataclass(frozen=True, eq=False)
class Categories:
    """Counts of the categories whose hash is below 2**bits, and the number of values in all.

    Up to `MOST_CATEGORIES` categories bits is 64 and every count is there. With more, bits falls until few enough are
    left. It is a function of the set of categories and can only fall as more come in: parts merge exactly, whatever
    their order ("distinct sampling", Gibbons 2001).

    Attributes:
        counts: category -> number of values.
        total: number of values, also those that are not kept.
        bits: see above.

    Example:
        >>> Categories.of({"a": 2}).merge(Categories.of({"a": 1, "b": 1})).counts
        {'a': 3, 'b': 1}
    """

    counts: Mapping[str, int]
    total: int
    bits: int = _ALL

    @staticmethod
    def of(counts: Mapping[str, int]) -> Categories:
        """Categories of all `counts`."""
        return _few_enough(counts, sum(counts.values()), _ALL)

    def merge(self, *others: Categories) -> Categories:
        """The categories of all values together, in alphabetical order."""
        parts = (self, *others)
        bits = min(part.bits for part in parts)
        united: dict[str, int] = {}
        for part in parts:
            for name, count in part.counts.items():
                if part.bits == bits or _hash(name) < 2**bits:
                    united[name] = united.get(name, 0) + count
        return _few_enough(united, sum(part.total for part in parts), bits)

    @property
    def is_complete(self) -> bool:
        """Whether every category is kept."""
        return self.bits == _ALL

    @property
    def distinct(self) -> int:
        """How many categories there are; an estimate (to about 2 %) where not all are kept."""
        return len(self.counts) << (_ALL - self.bits)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"counts": dict(self.counts), "total": self.total, "bits": self.bits}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Categories:
        """The reverse of `as_dict`.

        Raises:
            ArgumentError: the numbers make no categories.
        """
        counts = {str(name): int(count) for name, count in data["counts"].items()}
        if min(counts.values(), default=1) < 1 or sum(counts.values()) > data["total"]:
            raise ArgumentError("category counts must be at least 1 and not exceed their total")
        return Categories(counts, int(data["total"]), int(data["bits"]))


def _few_enough(counts: Mapping[str, int], total: int, bits: int) -> Categories:
    if len(counts) > MOST_CATEGORIES:
        hashes = {name: _hash(name) for name in counts}
        while len(hashes) > MOST_CATEGORIES:
            bits -= 1
            hashes = {name: value for name, value in hashes.items() if value < 2**bits}
        counts = {name: counts[name] for name in hashes}
    return Categories(dict(sorted(counts.items())), total, bits)


def _hash(name: str) -> int:
    """The same on every machine and in every process, as Python's own is not."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
