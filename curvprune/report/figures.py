"""Numbers as a reader wants them: as many digits as the standard error allows, with units, never
NaN."""

from __future__ import annotations

import math
import re

MISSING = "n/a"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
THIN = "\N{NO-BREAK SPACE}"
_SUPERSCRIPT = str.maketrans("-0123456789", "\N{SUPERSCRIPT MINUS}⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control characters would let a layer name drive a terminal, lone surrogates cannot be written as
# UTF-8.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)
_SMALLEST = 1e-290  # powers of ten underflow below it


def clean(value: object) -> str:
    """``str(value)`` with control, bidirectional-override and unencodable characters replaced by
    U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", str(value).replace("\r\n", "\n"))


def finite(value: float | None) -> float | None:
    """A float that is neither NaN nor infinite, else ``None``."""
    if value is None or not math.isfinite(value):
        return None
    return float(value) if abs(value) > _SMALLEST else 0.0


def _magnitude(value: float) -> int:
    """The power of ten of the leading digit."""
    return int(f"{abs(value):e}".split("e")[1])


def _with_sign(text: str) -> str:
    """A printed number with a proper minus sign, and none before zero."""
    if not text.strip("-0.,"):
        return text.lstrip("-")
    return text.replace("-", MINUS)


def fixed(value: float | None, decimals: int) -> str:
    """``value`` rounded to ``decimals`` (negative: to tens, hundreds, ...), with thousands
    separators."""
    number = finite(value)
    if number is None:
        return MISSING
    return _with_sign(f"{round(number, decimals):,.{max(0, decimals)}f}")


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def sig(value: float | None, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, in powers of ten outside 1e-4 ... 1e6."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    number = float(f"{number:.{digits - 1}e}")
    exponent = _magnitude(number)
    if -4 <= exponent < 6:
        return fixed(number, digits - 1 - exponent)
    return f"{fixed(number / 10.0**exponent, digits - 1)}{TIMES}{_power(exponent)}"


def short(value: float | None) -> str:
    """A number that a person chose (a budget, an axis tick): all its digits, none invented."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0 or -4 <= _magnitude(number) < 6:
        if number == int(number):
            return _with_sign(f"{int(number):,}")
        return _with_sign(f"{number:.12f}".rstrip("0").rstrip("."))
    exponent = _magnitude(number)
    digits = f"{abs(number) / 10.0**exponent:.6g}"
    sign = "-" if number < 0 else ""
    if digits == "1":
        return _with_sign(sign + _power(exponent))
    return _with_sign(f"{sign}{digits}{TIMES}{_power(exponent)}")


def decimals_of(stderr: float | None) -> int | None:
    """Decimals that show a standard error with two significant digits; ``None`` when there is no
    positive error."""
    error = finite(stderr)
    if error is None or error <= 0:
        return None
    return 1 - _magnitude(float(f"{error:.1e}"))


def plus_minus(value: float | None, stderr: float | None) -> str:
    """``value`` and its standard error, both rounded where the error has two significant digits."""
    number, error = finite(value), finite(stderr)
    if number is None:
        return MISSING
    if error is None:
        return f"{sig(number)}{THIN}{PLUS_MINUS}{THIN}{MISSING}"
    decimals = decimals_of(error)
    if decimals is None:
        return sig(number)
    exponent = _magnitude(max(abs(number), error))
    if -4 <= exponent < 6:
        return f"{fixed(number, decimals)}{THIN}{PLUS_MINUS}{THIN}{fixed(error, decimals)}"
    # Far from one, both share a power of ten: (1.234 ± 0.044) x 10⁻⁶.
    scale = 10.0**exponent
    decimals += exponent
    value_text, error_text = fixed(number / scale, decimals), fixed(error / scale, decimals)
    return f"({value_text}{THIN}{PLUS_MINUS}{THIN}{error_text}){TIMES}{_power(exponent)}"


def at_most(bound: float | None, budget: float | None, decimals: int) -> str:
    """An upper bound, rounded up so that the printed statement stays true, on the same side of
    ``budget`` as it is."""
    number, limit = finite(bound), finite(budget)
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


def count(value: float | None) -> str:
    """An integer with thousands separators."""
    number = finite(value)
    return MISSING if number is None else _with_sign(f"{round(number):,}")


def size(value: float | None) -> str:
    """Bytes in decimal units (1 MB = 1,000,000 B), four significant digits."""
    number = finite(value)
    if number is None:
        return MISSING
    if abs(number) < 1000:
        return f"{count(number)}{THIN}B"
    # Rounded first, so that 999,999 B are 1.000 MB and not 1000 kB.
    for prefix in ("k", "M", "G", "T"):
        number /= 1000.0
        rounded = float(f"{number:.3e}")
        if abs(rounded) < 1000 or prefix == "T":
            break
    return f"{fixed(rounded, max(0, 3 - _magnitude(rounded)))}{THIN}{prefix}B"


def duration(value: float | None) -> str:
    """Seconds, or minutes and hours where they read better."""
    number = finite(value)
    if number is None:
        return MISSING
    if number < 1:
        return f"{sig(number, 2)}{THIN}s"
    if number < 59.95:
        return f"{fixed(number, 1)}{THIN}s"
    minutes, seconds = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min{THIN}{seconds:02d}{THIN}s"
    hours, minutes = divmod(round(number / 60), 60)
    return f"{hours:,}{THIN}h{THIN}{minutes:02d}{THIN}min"


def percent(value: float | None) -> str:
    """A share as per cent: all the digits of a chosen level such as 0.95, and never 100 for less
    than all."""
    number = finite(value)
    if number is None:
        return MISSING
    for digits in range(8, 18):
        text = f"{100 * number:.{digits}g}"
        if number >= 1 or float(text) < 100:
            break
    return f"{text}{THIN}%"


def whole_percent(share: float | None) -> str:
    """A measured share in whole per cent."""
    return MISSING if share is None else f"{100 * share:.0f}{THIN}%"
