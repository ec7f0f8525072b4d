"""The page: whole HTML, nothing fetched, every id once, every figure with words, nothing unescaped."""

import base64
import hashlib
from html.parser import HTMLParser

import pytest

from batchnorm.reporting import figures
from batchnorm.reporting.page import inline_svg, render_study

HOSTILE = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }}"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that every tag closes, and collects what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.text = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def _note(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.references += [v for k, v in attrs if k in ("href", "src", "srcset", "action", "data", "xlink:href")]


@pytest.fixture(scope="module")
def svg():
    with figures.look():
        figure, axes = figures.panel("A panel", "step", "loss")
        axes.plot([1, 2], [3, 4], marker="o")
        axes.set_ylim(0, 3)  # something to clip
    return figures.to_svg(figure, "alt")


def _measure(**changes):
    measure = {"name": "ratio", "label": "ratio", "unit": "x", "values": [2.0, 3.0], "mean": 2.5, "low": 2, "high": 3}
    return measure | changes


def _results(claims=2, text="plain", measures=None):
    entries = [
        {
            "name": f"claim_{i}",
            **dict.fromkeys(("title", "claim", "source", "paper_figure", "threshold", "setup", "caveat"), text),
            "verdict": ("shown", "partly", "not shown")[i % 3],
            "reading": text,
            "headline": _measure(label=text),
            "measures": measures or [_measure(label=text)],
            "figures": [{"name": "f", "file": f"figures/{i}{part}.svg", "alt": text} for part in "ab"],
            "reported": [{"measure": "ratio", "value": 2.3, "where": text}],
            "runs": 4,
            "seconds": 1.5,
        }
        for i in range(claims)
    ]
    return {
        "schema": 1,
        "study": {"tier": "quick", "seeds": [0, 1], "version": "0.1.0", "unfinished": [text] if claims < 2 else []},
        "environment": {"python": "3.11", "platform": text},
        "data": [{"name": "digits", "rows": 1797, "sha256": "0" * 64}],
        "claims": entries,
    }


def _render(results, svg):
    return render_study(results, {f["file"]: svg for claim in results["claims"] for f in claim["figures"]})


@pytest.mark.parametrize("claims", [0, 1, 2, 9])
def test_page_is_whole_and_small_and_every_id_stands_once(svg, claims):
    html = _render(_results(claims), svg)
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert len(html.encode()) < 2_000_000
    assert {ref.removeprefix("#") for ref in page.references} <= set(page.ids)


def test_page_asks_for_nothing_outside_itself(svg):
    html = _render(_results(), svg)
    assert all(reference.startswith("#") for reference in Page(html).references)
    assert not any(tag in ("link", "img", "iframe", "object") for tag, _ in Page(html).tags)
    assert [attributes for tag, attributes in Page(html).tags if tag == "script"] == [{}]
    assert "@import" not in html
    assert all(part.startswith("(#") for part in html.split("url")[1:] if part.startswith("("))


def test_every_figure_has_alternative_text(svg):
    drawings = [a for tag, a in Page(_render(_results(), svg)).tags if tag == "svg" and a.get("class") == "plot"]
    assert len(drawings) == 4
    assert all(a["role"] == "img" and a["aria-label"] == "plain" for a in drawings)


def test_hostile_text_stays_text(svg):
    html = _render(_results(1, HOSTILE), svg)
    assert html.count("<script") == 1
    assert "".join(Page(html).text).count(HOSTILE) >= 10


def test_only_the_pages_own_script_is_allowed(svg):
    html = _render(_results(), svg)
    (policy,) = (a["content"] for tag, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy")
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_what_others_report_stands_beside_the_measure(svg):
    text = "".join(Page(_render(_results(1), svg)).text)
    assert "Reported elsewhere" in text
    assert "2.30\N{MULTIPLICATION SIGN}plain" in text


def test_verdicts_differ_without_colour(svg):
    text = "".join(Page(_render(_results(3), svg)).text)
    assert all(verdict in text for verdict in ("shown", "partly", "not shown"))


def test_numbers_that_are_missing_get_a_dash(svg):
    measure = _measure(mean=None, low=None, high=None, values=[None, 1.0])
    assert "\N{EN DASH} · 1" in _render(_results(1, measures=[measure]), svg)


def test_inline_svg_renames_every_id_and_its_references(svg):
    one, two = (Page(f"<p>{inline_svg(svg, prefix, 'alt')}</p>") for prefix in ("a-", "b-"))
    assert one.ids
    assert not set(one.ids) & set(two.ids)
    clips = [a["clip-path"] for _, a in one.tags if "clip-path" in a]
    assert clips
    assert {clip.removeprefix("url(#").removesuffix(")") for clip in clips} <= set(one.ids)
