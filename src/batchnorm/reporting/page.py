"""One self-contained HTML page from results that are already measured: it renders, it never computes.

A page's security policy forbids every request and every script but its own, which sorts tables.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.reporting.numbers import interval, number, quantity

_SVG = "http://www.w3.org/2000/svg"
_XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_LONG_DECIMAL = re.compile(r"(\.\d\d)\d+")


def render_study(results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """Render the report of `batchnorm study`.

    Args:
        results: what results.json holds, schema 1.
        figures: the SVG document of each figure, by the name of its file in `results`.

    Returns:
        An HTML document that asks for nothing outside itself.
    """
    return _templates().get_template("study.html").render(results=results, figures=figures)


def render(template: str, **values: Any) -> str:
    """Render one of the package's templates.

    Args:
        template: its file name.
        values: what it shows, by the names that it knows.

    Returns:
        An HTML document that asks for nothing outside itself.
    """
    return _templates().get_template(template).render(**values)


def inline_svg(document: str, prefix: str, alt: str) -> Markup:
    """Make an SVG document part of a page.

    Every id that is used gets the prefix and every other one goes, so that two figures of a page never share one;
    coordinates keep two decimals, which halves the page; the size is left to the page's style.

    Args:
        document: an SVG document, as `figures.to_svg` gives it.
        prefix: differs for each figure of the page.
        alt: the alternative text.

    Returns:
        Markup of one <svg> element.
    """
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(document)
    used = {e.attrib[_XLINK_HREF].removeprefix("#") for e in root.iter() if _XLINK_HREF in e.attrib}
    for element in root.iter():
        used.update(name for value in element.attrib.values() for name in _REFERENCE.findall(value))
    for element in root.iter():
        _rename(element, prefix, used)
        if element.tag != f"{{{_SVG}}}text":
            element.text = None
        element.tail = None
    for title in root.findall(f"{{{_SVG}}}title"):
        root.remove(title)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-label": alt, "class": "plot"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _rename(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    if element.get("id", "") not in used:
        element.attrib.pop("id", None)
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.attrib[key] = prefix + value
        elif key == _XLINK_HREF:
            del element.attrib[key]
            element.attrib["href"] = "#" + prefix + value.removeprefix("#")
        elif key in ("d", "x", "y", "points", "transform"):
            element.attrib[key] = " ".join(_LONG_DECIMAL.sub(r"\1", value).split())
        else:
            element.attrib[key] = _REFERENCE.sub(rf"url(#{prefix}\1)", value)


def anchor(name: str) -> str:
    """Turn a name into an id that a link can point to.

    Args:
        name: any text.

    Returns:
        Lower-case letters, digits and hyphens.

    >>> anchor("feature_scaling")
    'feature-scaling'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("batchnorm.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "quantity": quantity, "anchor": anchor}
    script = environment.get_template("page.js").render()
    environment.globals |= {
        "interval": interval,
        "inline_svg": inline_svg,
        "zip": zip,
        "script": Markup(script),
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment
