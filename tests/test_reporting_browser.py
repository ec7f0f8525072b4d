"""The pages in a real browser: quiet, asking for nothing, readable on phone and desk, in light and dark, sortable.

One start of the browser for all of it.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from playwright import sync_api
from toy_claims import make_claim

from batchnorm.lab import report
from batchnorm.lab.claim import Reported
from batchnorm.lab.claims import CLAIMS
from batchnorm.lab.comparison import comparison_page
from batchnorm.lab.measured import measured
from batchnorm.lab.measures import ratio_over_seeds
from batchnorm.lab.study import run_study
from batchnorm.reporting.figures import look, to_svg
from batchnorm.reporting.page import render_study
from batchnorm.shift import Reference, render
from batchnorm.shift.compare import compare

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (375, 1440)
SCHEMES = ("light", "dark")
TEXTS = """() => {
  const luminance = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return null; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !e.checkVisibility() || e.closest("script, .visually-hidden")) continue;
    const style = getComputedStyle(e), ink = parse(e.closest("svg") ? style.fill : style.color).slice(0, 3);
    const [low, high] = [luminance(ink), luminance(behind(e))].sort((a, b) => a - b);
    const scale = e.closest("svg")?.getScreenCTM().a ?? 1;
    found.push({ contrast: (high + 0.05) / (low + 0.05), size: parseFloat(style.fontSize) * scale, text });
  }
  return found;
}"""
"""Every visible text: its contrast to what is behind it, its size in CSS pixels."""
ORDER = "table => [...table.tBodies[0].rows].map(row => row.cells[0].textContent.trim())"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A study with the words of real claims, two studies side by side, and a shift report."""
    folder = tmp_path_factory.mktemp("pages")
    toys = make_claim("first"), make_claim("second", verdict="partly")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "CLAIMS", toys)
        list(run_study(folder / "a", claims=toys, seeds=(0, 1, 2), workers=1))
        report.write_report(folder / "a")
    named = folder / "a_study_with_quite_a_long_name_of_its_folder"
    shutil.copytree(folder / "a", named)
    rng = np.random.default_rng(0)
    kinds = {"kind": rng.choice(["red", "a category with a long name"], 300), "y": rng.normal(0, 1, 300)}
    old, new = (pl.DataFrame({"age": rng.normal(at, 1, 300), **kinds}) for at in (0, 1))
    remembered = Reference.of(old)
    found = compare(remembered, Reference.of(new, like=remembered), target="y")
    html = {
        "study": whole_study(),
        "compare": comparison_page(folder / "a", named),
        "shift": render.as_html(found, reference="reference.json", new="new.csv", version="0.1.0"),
    }
    for name, text in html.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in html}


def whole_study() -> str:
    """The page of a study of the eight most wordy claims; its numbers are made up."""
    reported = Reported("ratio", 2.3, "paper: Inception on ImageNet")
    claims: list[dict[str, Any]] = []
    for place, claim in enumerate(sorted(CLAIMS, key=lambda claim: -len(str(claim.CARD)))[:8]):
        label = max(claim.CARD.threshold.split("."), key=len)
        measures = [asdict(ratio_over_seeds("ratio", label, [1.0 + place, 2.0, 3.0])) for _ in range(4)]
        verdict = {"verdict": ("not shown", "shown", "partly")[place % 3], "reading": claim.CARD.caveat}
        rest = {"headline": measures[0], "measures": measures, "figures": [], "runs": 9, "seconds": 100.0 - place}
        claims.append(asdict(claim.CARD) | verdict | rest | {"reported": [asdict(reported)]})
    with look():
        ((figure, alt),) = measured(claims[:1]).values()
        drawing = to_svg(figure, alt)
    for claim in claims:
        claim["figures"] = [{"name": part, "file": part, "alt": alt} for part in "ab"]
    study = {"tier": "full", "seeds": [0, 1, 2], "version": "0.1.0", "unfinished": []}
    environment = {
        "processor": "A processor with quite a long name @ 2.10GHz",
        "platform": "Linux-6.1-x86_64-with-glibc",
    }
    data = [{"name": "images", "sha256": "0123456789abcdef" * 4}]
    results = {"study": study, "environment": environment, "data": data, "claims": claims}
    return render_study(results, dict.fromkeys("ab", drawing))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_pages_in_a_browser(pages: dict[str, Path], subtests: pytest.Subtests) -> None:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        try:
            for name, path in pages.items():
                context = browser.new_context(offline=True)
                context.set_default_timeout(120_000)  # milliseconds; tests share their processor
                page = context.new_page()
                said: list[str] = []
                asked: list[str] = []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(path.as_uri())
                for width in WIDTHS:
                    page.set_viewport_size({"width": width, "height": 900})
                    for scheme in SCHEMES:
                        page.emulate_media(color_scheme=scheme)
                        with subtests.test(page=name, width=width, scheme=scheme):
                            assert_readable(page)
                with subtests.test(page=name, check="anchors"):
                    assert_anchors_lead_there(page)
                with subtests.test(page=name, check="sorting"):
                    assert_tables_sort(page)
                with subtests.test(page=name, check="print"):
                    assert page.pdf(format="A4").startswith(b"%PDF")
                with subtests.test(page=name, check="quiet and alone"):
                    assert said == []
                    assert asked == [path.as_uri()]
                context.close()
        finally:
            browser.close()


def assert_readable(page: Any) -> None:
    """No sideways scrolling, WCAG's contrast of 4.5 for every text, and none too small to read."""
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    texts = page.evaluate(TEXTS)
    assert len(texts) > 30
    assert [text for text in texts if text["contrast"] < 4.5] == []
    assert [text for text in texts if text["size"] < 9] == []


def assert_anchors_lead_there(page: Any) -> None:
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert all(link.startswith("#") for link in links)
    page.emulate_media(reduced_motion="reduce")
    for link in dict.fromkeys(links[:3] + links[-1:]):
        page.locator(f"a[href='{link}']").first.click()
        assert page.evaluate("location.hash") == link
        assert page.locator(link).first.is_visible()
        if link != "#verdicts":
            top = page.locator(link).bounding_box()["y"]
            bottom = page.evaluate("document.documentElement.scrollHeight - scrollY - innerHeight")
            assert 0 <= top < 100 or bottom < 2


def assert_tables_sort(page: Any) -> None:
    for table in page.locator("table.sortable").all()[:2]:
        before = table.evaluate(ORDER)
        head = table.locator("th:has(button)").first
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        upwards = table.evaluate(ORDER)
        assert upwards == sorted(before, key=str.casefold)
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert table.evaluate(ORDER) == upwards[::-1]
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "none"
        assert table.evaluate(ORDER) == before
