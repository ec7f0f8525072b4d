"""Numbers as people read them, in tables, sentences and on the terminal."""

import math

_NONE, _MINUS, _TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_THIN_SPACE = "\u2009"
_NO_BREAK_SPACE = "\u00a0"


def number(value: float | None) -> str:
    """Write a number with three significant digits.

    Args:
        value: any number, or None where there is none.

    Returns:
        Plain digits between 0.001 and 100,000 (whole numbers in full), powers of ten beyond, a dash for None and NaN.

    >>> [number(x) for x in (0, 0.95214, 45.25, 1797, 12345.6, 4.6e8, 2e-7, float("inf"))]
    ['0', '0.952', '45.2', '1,797', '12,346', '4.6·10⁸', '2·10⁻⁷', '∞']
    """
    if value is None or math.isnan(value):
        return _NONE
    sign = _MINUS if value < 0 else ""
    size = abs(float(value))
    if math.isinf(size):
        return f"{sign}∞"
    if size == 0:
        return "0"
    if not 1e-3 <= size < 1e5:
        mantissa, exponent = f"{size:.2e}".split("e")
        return f"{sign}{mantissa.rstrip('0').rstrip('.')}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    if size >= 100 or size.is_integer():
        return f"{sign}{size:,.0f}"
    return f"{sign}{size:.{2 - math.floor(math.log10(size))}f}"


def quantity(value: float | None, unit: str) -> str:
    r"""Write a number with its unit.

    Args:
        value: any number, or None where there is none.
        unit: "%", "x" (times), a word, or nothing.

    Returns:
        The number and its unit, which no line break separates.

    >>> quantity(97.31, "%"), quantity(310, "steps")
    ('97.3\u2009%', '310\xa0steps')
    """
    text = number(value)
    if value is None or math.isnan(value) or not unit:
        return text
    if unit == "x":
        return text + (f"{_NO_BREAK_SPACE}times" if "·" in text else _TIMES)
    return text + (_THIN_SPACE if unit == "%" else _NO_BREAK_SPACE) + unit


def interval(low: float | None, high: float | None) -> str:
    """Write an interval, without its unit.

    Args:
        low: the lower end, or None where there is none (a single seed).
        high: the upper end, or None.

    Returns:
        "low to high", or nothing where there is no interval.

    >>> interval(41.04, 49.8), interval(None, None)
    ('41.0 to 49.8', '')
    """
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return f"{number(low)} to {number(high)}"
