"""Two studies side by side: verdicts, headlines and every measure of the claims that both have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.errors import ArgumentError
from batchnorm.lab.report import SCHEMA

RESULTS = "results.json"
LONGEST_NAME = 26


@dataclass(frozen=True)
class Side:
    """One claim in one study.

    Attributes:
        verdict: "shown", "partly" or "not shown".
        mean: of the measure, None where it was not finite.
        low: lower end of its interval.
        high: upper end.
    """

    verdict: str
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Compared:
    """One measure of one claim in both studies.

    Attributes:
        claim: name of the claim.
        title: its heading.
        measure: name of the measure.
        label: what it is, in words.
        unit: of the values.
        is_headline: whether the verdict rests on it first.
        first: in the first study.
        second: in the second one.
    """

    claim: str
    title: str
    measure: str
    label: str
    unit: str
    is_headline: bool
    first: Side
    second: Side

    @property
    def agrees(self) -> bool:
        """Whether the verdicts are the same and the intervals of this measure overlap."""
        return self.has_same_verdict and self.intervals_overlap

    @property
    def has_same_verdict(self) -> bool:
        """Whether both studies give the claim the same verdict."""
        return self.first.verdict == self.second.verdict

    @property
    def intervals_overlap(self) -> bool:
        """Whether the intervals of this measure overlap; where one of them is not known nothing says otherwise."""
        ends = self.first.low, self.first.high, self.second.low, self.second.high
        if any(end is None for end in ends):
            return True
        low, high, other_low, other_high = (float(end) for end in ends if end is not None)
        return low <= other_high and other_low <= high


@dataclass(frozen=True)
class Comparison:
    """Two studies.

    Attributes:
        names: of their folders.
        rows: every measure that both have, claim by claim.
        only: (claims of the first alone, claims of the second alone).
    """

    names: tuple[str, str]
    rows: tuple[Compared, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def headlines(self) -> tuple[Compared, ...]:
        """The rows that verdicts rest on first."""
        return tuple(row for row in self.rows if row.is_headline)


def compare(first: Path, second: Path) -> Comparison:
    """Compare what two studies found.

    Args:
        first: output folder of a study with a report.
        second: another one.

    Returns:
        The comparison, in the order of the first study.

    Raises:
        ArgumentError: a folder holds no results, or those of another version.
    """
    one, other = (_claims(_results(folder)) for folder in (first, second))
    rows = []
    for name in (name for name in one if name in other):
        mine, theirs = one[name], other[name]
        second_measures = {measure["name"]: measure for measure in theirs["measures"]}
        for measure in mine["measures"]:
            match = second_measures.get(measure["name"])
            if match is not None:
                rows.append(
                    Compared(
                        name,
                        mine["title"],
                        measure["name"],
                        measure["label"],
                        measure["unit"],
                        measure["name"] == mine["headline"]["name"],
                        _side(mine, measure),
                        _side(theirs, match),
                    )
                )
    only = tuple(name for name in one if name not in other), tuple(name for name in other if name not in one)
    return Comparison((str(first), str(second)), tuple(rows), only)


def _side(claim: Mapping[str, Any], measure: Mapping[str, Any]) -> Side:
    return Side(claim["verdict"], measure["mean"], measure["low"], measure["high"])


def comparison_page(first: Path, second: Path) -> str:
    """Two studies as one HTML page: verdicts, then claim by claim the figures and the measures of both.

    Args:
        first: output folder of a study with a report.
        second: another one.

    Returns:
        An HTML document that asks for nothing outside itself.

    Raises:
        ArgumentError: a folder holds no results, or those of another version.
    """
    from batchnorm.lab.measured import measured
    from batchnorm.reporting.figures import look, to_svg
    from batchnorm.reporting.page import render

    folders = first, second
    names = _names(first, second)
    results = [_results(folder) for folder in folders]
    one, other = (_claims(found) for found in results)
    claims = []
    for name in (name for name in one if name in other):
        with look():
            both = [
                {"svg": to_svg(drawing, alt), "alt": alt}
                for drawing, alt in measured((one[name], other[name]), names).values()
            ]
        pairs = [
            {"of": study, "alt": figure["alt"], "svg": (folder / figure["file"]).read_text(encoding="utf-8")}
            for file in _drawn(one[name], first)
            if file in _drawn(other[name], second)
            for folder, study, claim in zip(folders, names, (one[name], other[name]), strict=True)
            for figure in claim["figures"]
            if figure["file"] == file
        ]
        claims.append({"name": name, "title": one[name]["title"], "both": both, "pairs": pairs})
    return render(
        "compare.html",
        found=compare(first, second),
        names=names,
        claims=claims,
        environments=[
            {"folder": str(folder), "tier": found["study"]["tier"]}
            | {"seeds": ", ".join(map(str, found["study"]["seeds"]))}
            | found["environment"]
            for folder, found in zip(folders, results, strict=True)
        ],
    )


def _names(first: Path, second: Path) -> tuple[str, str]:
    """As many of the last parts of both paths as tell them apart, shortened to what a legend on a phone holds."""
    one, other = first.resolve().parts, second.resolve().parts
    count = 1
    while one[-count:] == other[-count:] and count < max(len(one), len(other)):
        count += 1
    if one == other:
        count = 1
    return _shortened("/".join(one[-count:])), _shortened("/".join(other[-count:]))


def _shortened(name: str) -> str:
    """Its beginning and its end, which is where names of studies differ."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2 - 1]}…{name[-LONGEST_NAME // 2 :]}"


def _drawn(claim: Mapping[str, Any], folder: Path) -> list[str]:
    """The figures of a claim that are there, but for those of its measures, which one panel shows for both."""
    files = [figure["file"] for figure in claim["figures"] if not figure["name"].startswith("measures_")]
    return [file for file in files if (folder / file).is_file()]


def _claims(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {claim["name"]: claim for claim in results["claims"]}


def _results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    if not path.is_file():
        raise ArgumentError(
            f"expected a folder with the {RESULTS} of a study, {folder} has none; make it: "
            f"batchnorm study --report-only {folder}"
        )
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema, _ = results["schema"], results["claims"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ArgumentError(f"{path} holds no results of a study ({type(error).__name__}: {error})") from error
    if schema != SCHEMA:
        raise ArgumentError(f"{path} has schema {schema}, expected {SCHEMA}; make it again with --report-only {folder}")
    return results
