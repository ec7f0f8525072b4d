"""What a claim is: a module with a card, jobs, measures, a verdict and a figure; and the data that pass between them.

- CARD: what is claimed, by whom, and from which numbers on it counts as shown.
- jobs(seeds, tier): the runs that it needs.
- run(job): trains them, a record a run (most claims take `batchnorm.lab.train.train` as it is).
- measure(records): numbers with intervals; never trains.
- judge(measures): the verdict, by thresholds that stand as constants at the top of the module.
- figure(records, measures): what one should see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from batchnorm.lab.config import Job, Tier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record: TypeAlias = Mapping[str, Any]
"""One line of records.jsonl, as `batchnorm.lab.record` describes it."""

Figures: TypeAlias = "dict[str, tuple[Figure, str]]"
"""File name without ending -> (figure, alternative text)."""


@dataclass(frozen=True)
class Reported:
    """A number of the source's own, shown beside the measure here that asks the same question.

    Attributes:
        measure: Name of that measure.
        value: In the measure's unit.
        where: What it is of; two data sets and networks are never the same, and this says so.
    """

    measure: str
    value: float
    where: str


@dataclass(frozen=True)
class Card:
    """A claim in words.

    Attributes:
        name: What `--claim` takes; the name of the module.
        title: A short heading.
        claim: The claim in plain words.
        source: Who makes it, and where.
        paper_figure: What the source reports, in numbers where it has them.
        setup: What was trained here, on what, and how the arms were tuned.
        caveat: What this experiment cannot say.
        threshold: From which numbers on it counts as shown, or as partly shown.
        tier: The tier that runs it.
        reported: The source's numbers, where a measure here asks the same question.
    """

    name: str
    title: str
    claim: str
    source: str
    paper_figure: str
    setup: str
    caveat: str
    threshold: str
    tier: Tier = "quick"
    reported: tuple[Reported, ...] = ()


@dataclass(frozen=True)
class Measure:
    """A number that was measured once for each seed, with its mean and 95 % Student-t interval over the seeds.

    Attributes:
        name: Key in results.json.
        label: What it is, in words.
        unit: Unit of the values; "x" for a ratio, "" for a pure number.
        values: One value for each seed, in the order of the seeds.
        mean: Mean over the seeds; for a ratio the geometric mean.
        low: Lower end of the interval; with one seed, the mean itself.
        high: Upper end of the interval.
    """

    name: str
    label: str
    unit: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        verdict: Whether the claim shows.
        headline: The measure that the verdict rests on first.
        reading: Plain sentences, with the numbers in them.
    """

    verdict: Literal["shown", "partly", "not shown"]
    headline: Measure
    reading: str


class Claim(Protocol):
    """The module of a claim: it satisfies the protocol by having these names."""

    @property
    def CARD(self) -> Card:  # noqa: N802 - a constant of the module
        """The claim in words."""

    def jobs(self, seeds: Sequence[int], tier: Tier) -> list[Job]:
        """The runs that the claim needs, as stacks; the longest first."""

    def run(self, job: Job) -> list[dict[str, Any]]:
        """Train the runs of a job: one record for each, in their order."""

    def measure(self, records: Sequence[Record]) -> list[Measure]:
        """Numbers with intervals from the records of all of the claim's runs."""

    def judge(self, measures: Sequence[Measure]) -> Verdict:
        """The verdict by the thresholds that the card states."""

    def figure(self, records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
        """What one should see."""
