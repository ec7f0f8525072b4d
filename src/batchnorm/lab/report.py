"""records -> measures -> verdicts -> results.json, CSV, figures and one HTML page. Nothing here trains."""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from batchnorm.errors import ArgumentError
from batchnorm.lab.claim import Card, Claim, Measure, Record, Verdict
from batchnorm.lab.claims import CLAIMS
from batchnorm.lab.config import Data, Tier
from batchnorm.lab.data import load
from batchnorm.lab.record import RecordFile, Session

SCHEMA = 1


@dataclass(frozen=True)
class Judged:
    """A claim with everything that its records say.

    Attributes:
        claim: The module of the claim.
        records: The records of all of its runs.
        measures: Numbers with intervals.
        verdict: The verdict.
    """

    claim: Claim
    records: tuple[Record, ...]
    measures: tuple[Measure, ...]
    verdict: Verdict

    @property
    def card(self) -> Card:
        """The claim in words."""
        return self.claim.CARD

    @property
    def seconds(self) -> float:
        """What its runs cost in compute, in seconds, summed over workers."""
        return math.fsum(record["seconds"] for record in self.records)


def judge(claim: Claim, records: Sequence[Record]) -> Judged:
    """Measure and judge a claim.

    Args:
        claim: The module of the claim.
        records: The records of all of its runs, and no others.

    Returns:
        The claim with its measures and its verdict.
    """
    # In the order of their keys' configuration, not of finishing: the same seeds give the same bytes.
    ordered = sorted(records, key=lambda record: (record["arm"], record["seed"], record["rate"], record["key"]))
    measures = claim.measure(ordered)
    return Judged(claim, tuple(ordered), tuple(measures), claim.judge(measures))


def write_report(folder: Path) -> dict[str, Any]:
    """Write what the records of a folder say: results.json, report.html, figures/ and tables/.

    Claims with missing runs are left out and named. Every file is made beside its place first and then renamed, so
    that a break-off leaves the report that was there.

    Args:
        folder: An output folder of the study.

    Returns:
        What results.json holds.

    Raises:
        ArgumentError: The folder holds no records of a study, or its data are not those that are here now.
    """
    file = RecordFile(folder)
    sessions = file.sessions()
    if not sessions:
        raise ArgumentError(
            f"expected a folder with the records of a study, but {str(folder)!r} holds none; "
            f"train first: batchnorm study --out {folder}"
        )
    judged, unfinished = _collect(sessions, file.records(), file.failures())
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as made:
        images = next((session.images for session in sessions if session.images is not None), None)
        results = _make(Path(made), sessions[-1], judged, unfinished, images)
        _move(Path(made), folder)
    return results


def _collect(
    sessions: Sequence[Session], records: Iterable[Record], failures: Mapping[str, str]
) -> tuple[list[Judged], list[str]]:
    """The claims that are finished, and the titles of those that were asked for and are not, with what failed."""
    found = {record["key"]: record for record in records}
    asked = {name: session for session in sessions for name in session.claims}
    judged: list[Judged] = []
    unfinished: list[str] = []
    for claim in CLAIMS:
        session = asked.get(claim.CARD.name)
        if session is None:
            continue
        jobs = [job.given("", session.network) for job in claim.jobs(session.seeds, cast(Tier, session.tier))]
        keys = [run.key for job in jobs for run in job.runs]
        if all(key in found for key in keys):
            judged.append(judge(claim, [found[key] for key in keys]))
        else:
            failed = [key for key in keys if key in failures]
            why = f" ({len(failed)} of its {len(keys)} runs failed; {failures[failed[0]]})" if failed else ""
            unfinished.append(claim.CARD.title + why)
    return judged, unfinished


def _make(
    made: Path,
    session: Session,
    judged: Sequence[Judged],
    unfinished: Sequence[str],
    images: Mapping[str, Any] | None,
) -> dict[str, Any]:
    from batchnorm.reporting.page import render_study

    drawings: dict[str, str] = {}
    claims = []
    for one in judged:
        entry = _entry(one)
        for listed, svg in _draw(made, one, entry):
            entry["figures"].append(listed)
            drawings[listed["file"]] = svg
        claims.append(entry)
    environment = dict(session.environment)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "study": {
            "tier": session.tier,
            "seeds": list(session.seeds),
            "version": environment["batchnorm"],
            "unfinished": list(unfinished),
        },
        "environment": environment,
        "data": _data(judged, images),
        "claims": claims,
    }
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (made / "results.json").write_text(text, encoding="utf-8")
    (made / "report.html").write_text(render_study(results, drawings), encoding="utf-8")
    _tables(made / "tables", claims)
    return results


def _draw(made: Path, judged: Judged, entry: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], str]]:
    """Write the figures of a claim: its own, then its measures; each as results.json lists it, and as SVG."""
    from batchnorm.lab.measured import measured
    from batchnorm.reporting.figures import look, to_pdf, to_png, to_svg

    (made / "figures").mkdir(exist_ok=True)
    with look():
        figures = judged.claim.figure(judged.records, judged.measures) | measured([entry])
        for name, (figure, alt) in figures.items():
            stem = f"figures/{judged.card.name}-{name}"
            svg = to_svg(figure, alt)
            (made / f"{stem}.svg").write_text(svg, encoding="utf-8")
            (made / f"{stem}.png").write_bytes(to_png(figure))
            (made / f"{stem}.pdf").write_bytes(to_pdf(figure))
            yield {"name": name, "file": f"{stem}.svg", "alt": alt}, svg


def _entry(judged: Judged) -> dict[str, Any]:
    return {
        **asdict(judged.card),
        "reported": [asdict(one) for one in judged.card.reported],
        "verdict": judged.verdict.verdict,
        "reading": judged.verdict.reading,
        "headline": _measure(judged.verdict.headline),
        "measures": [_measure(measure) for measure in judged.measures],
        "figures": [],
        "seeds": sorted({record["seed"] for record in judged.records}),
        "runs": len(judged.records),
        "seconds": round(judged.seconds, 2),
    }


def _measure(measure: Measure) -> dict[str, Any]:
    """A measure as JSON values: what is not finite, which JSON cannot hold, becomes None."""
    entry = asdict(measure)
    entry |= {name: _finite(entry[name]) for name in ("mean", "low", "high")}
    entry["values"] = [_finite(value) for value in measure.values]
    return entry


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _data(judged: Sequence[Judged], images: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    used = {record["data"]["name"]: record["data"]["sha256"] for one in judged for record in one.records}
    cards = []
    for name, sha256 in sorted(used.items()):
        if name == "images":  # a folder has records of one set of images only
            cards.append(dict(images or {"name": name, "sha256": sha256}))
            continue
        card = load(cast(Data, name)).card
        if card["sha256"] != sha256:
            raise ArgumentError(
                f"expected the data set {name!r} with the sha256 of the records, {sha256}, but the installed "
                f"scikit-learn has {card['sha256']}; train again into another folder"
            )
        cards.append(dict(card))
    return cards


def _tables(folder: Path, claims: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir()
    numbers = ("label", "unit", "mean", "low", "high")
    _csv(
        folder / "verdicts.csv",
        ("claim", "title", "verdict", *numbers, "runs", "seconds"),
        (
            (c["name"], c["title"], c["verdict"], *(c["headline"][n] for n in numbers), c["runs"], c["seconds"])
            for c in claims
        ),
    )
    _csv(
        folder / "measures.csv",
        ("claim", "measure", *numbers),
        ((c["name"], m["name"], *(m[n] for n in numbers)) for c in claims for m in c["measures"]),
    )
    _csv(
        folder / "values.csv",
        ("claim", "measure", "index", "value"),
        (
            (c["name"], m["name"], index, value)
            for c in claims
            for m in c["measures"]
            for index, value in enumerate(m["values"])
        ),
    )


def _csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _move(made: Path, folder: Path) -> None:
    """Put the files in their places; the page last, so that what it tells of is there."""
    paths = sorted(path for path in made.rglob("*") if path.is_file())
    for path in sorted(paths, key=lambda path: path.name == "report.html"):
        target = folder / path.relative_to(made)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
