"""Numbers as a reader wants them: significant digits set by the standard error, units, never
NaN."""

from __future__ import annotations

import math
import re
from typing import Any

MISSING = "n/a"
MINUS, TIMES, PLUS_MINUS, THIN = (
    "\N{MINUS SIGN}",
    "\N{MULTIPLICATION SIGN}",
    "\N{PLUS-MINUS SIGN}",
    "\N{NO-BREAK SPACE}",
)
_SUPERSCRIPT = str.maketrans("-0123456789", "\N{SUPERSCRIPT MINUS}⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control characters would let a layer name drive a terminal, lone surrogates cannot be written as
# UTF-8.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)


def clean(value: Any) -> str:
    """``str(value)`` with control, bidirectional-override and unencodable characters replaced by
    U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n"))


def num(value: Any) -> float | None:
    """A finite float, or ``None`` for anything else (missing, NaN, infinite, not a number)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not math.isfinite(number):
        return None
    return number if abs(number) > 1e-290 else 0.0  # below, powers of ten underflow


def _magnitude(value: float) -> int:
    """The power of ten of the leading digit."""
    return int(f"{abs(value):e}".split("e")[1])


def _signed(text: str) -> str:
    if not text.strip("-0.,"):
        return text.lstrip("-")
    return text.replace("-", MINUS)


def fixed(value: Any, decimals: int) -> str:
    """``value`` rounded to ``decimals`` (negative: to tens, hundreds, ...), with thousands
    separators."""
    number = num(value)
    if number is None:
        return MISSING
    return _signed(f"{round(number, decimals):,.{max(0, decimals)}f}")


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def sig(value: Any, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, in powers of ten outside 1e-4 ... 1e6."""
    number = num(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    number = float(f"{number:.{digits - 1}e}")
    exponent = _magnitude(number)
    if -4 <= exponent < 6:
        return fixed(number, digits - 1 - exponent)
    return f"{fixed(number / 10.0**exponent, digits - 1)}{TIMES}{_power(exponent)}"


def short(value: Any) -> str:
    """A number that a person chose (a budget, an axis tick): all its digits, none invented."""
    number = num(value)
    if number is None:
        return MISSING
    if number == 0 or -4 <= _magnitude(number) < 6:
        text = (
            f"{number:.12f}".rstrip("0").rstrip(".")
            if number != int(number)
            else f"{int(number):,}"
        )
        return _signed(text)
    exponent = _magnitude(number)
    mantissa = f"{number / 10.0**exponent:.6g}"
    sign, digits = ("-", mantissa[1:]) if mantissa.startswith("-") else ("", mantissa)
    return _signed(
        sign + (_power(exponent) if digits == "1" else f"{digits}{TIMES}{_power(exponent)}")
    )


def decimals_of(stderr: Any) -> int | None:
    """Decimals that show a standard error with two significant digits; ``None`` when there is no
    positive error."""
    error = num(stderr)
    if error is None or error <= 0:
        return None
    return 1 - _magnitude(float(f"{error:.1e}"))


def plus_minus(value: Any, stderr: Any) -> str:
    """``value`` and its standard error, both rounded where the error has two significant digits."""
    number, error = num(value), num(stderr)
    if number is None:
        return MISSING
    if error is None or error < 0:
        return f"{sig(number)}{THIN}{PLUS_MINUS}{THIN}{MISSING}"
    if error == 0:
        return sig(number)
    exponent = _magnitude(max(abs(number), error))
    decimals = decimals_of(error)
    assert decimals is not None
    if -4 <= exponent < 6:
        return f"{fixed(number, decimals)}{THIN}{PLUS_MINUS}{THIN}{fixed(error, decimals)}"
    scale = 10.0**exponent
    decimals += exponent
    body = (
        f"{fixed(number / scale, decimals)}{THIN}{PLUS_MINUS}{THIN}{fixed(error / scale, decimals)}"
    )
    return f"({body}){TIMES}{_power(exponent)}"


def at_most(bound: Any, budget: Any, decimals: int) -> str:
    """An upper bound, rounded up so that the printed statement stays true, on the same side of
    ``budget`` as it is."""
    number, limit = num(bound), num(budget)
    if number is None:
        return MISSING
    if abs(number) > 1e12:
        return short(number)
    for places in range(decimals, decimals + 10):
        scaled = number * 10.0**places
        # The tolerance keeps a bound that is already a round decimal from moving up one unit
        # through binary noise.
        shown = math.ceil(scaled - 1e-9 * max(1.0, abs(scaled))) / 10.0**places
        if limit is None or (shown > limit) == (number > limit):
            return fixed(shown, places)
    return short(number)


def count(value: Any) -> str:
    """An integer with thousands separators."""
    number = num(value)
    return MISSING if number is None else _signed(f"{round(number):,}")


def size(value: Any) -> str:
    """Bytes in decimal units (1 MB = 1,000,000 B), four significant digits."""
    number = num(value)
    if number is None:
        return MISSING
    if abs(number) < 1000:
        return f"{count(number)}{THIN}B"
    for measure in ("kB", "MB", "GB", "TB"):
        number /= 1000.0
        rounded = float(f"{number:.3e}")
        if abs(rounded) < 1000 or measure == "TB":
            return f"{fixed(rounded, max(0, 3 - _magnitude(rounded)))}{THIN}{measure}"
    raise AssertionError("unreachable")


def duration(value: Any) -> str:
    """Seconds, or minutes and hours where they read better."""
    number = num(value)
    if number is None:
        return MISSING
    if number < 59.95:
        return f"{sig(number, 2) if number < 1 else fixed(number, 1)}{THIN}s"
    minutes, seconds = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min{THIN}{seconds:02d}{THIN}s"
    hours, minutes = divmod(round(number / 60), 60)
    return f"{hours:,}{THIN}h{THIN}{minutes:02d}{THIN}min"


def percent(value: Any) -> str:
    """A share as per cent: all the digits of a chosen level such as 0.95."""
    number = num(value)
    return MISSING if number is None else f"{100 * number:.8g}{THIN}%"
