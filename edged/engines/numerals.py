"""Grammars (GBNF) of decimal numbers within bounds, in JSON's spelling (RFC 8259, section 6).

Every number has at most 15 significant digits, so that reading it as a float64 rounds it to no bound it must not touch.
"""

from __future__ import annotations

WHOLE_DIGITS = 15  # of a whole number
INTEGER_MAX = 10**WHOLE_DIGITS - 1
FRACTION_DIGITS = 9
RANGE_MAX = 10 ** (WHOLE_DIGITS - FRACTION_DIGITS) - 1  # the largest bound of numbers with a fraction
_WHOLE = f'("0" | [1-9] [0-9]{{0,{WHOLE_DIGITS - 1}}})'
_FRACTION = f'("." [0-9]{{1,{FRACTION_DIGITS}}})?'
_ZEROS = f'("." "0"{{1,{FRACTION_DIGITS}}})?'


def free_integer() -> str:
    """Any whole number."""
    return f'"-"? {_WHOLE}'


def free_number() -> str:
    """Any number; its exponent has at most two digits, so that no float64 overflows."""
    return f'"-"? {_WHOLE} {_FRACTION} ([eE] [-+]? [0-9]{{1,2}})?'


def integers(low: int, high: int) -> str:
    """The whole numbers from `low` to `high`; needs -INTEGER_MAX <= low <= high <= INTEGER_MAX."""
    options = []
    if low < 0:
        options.append(f'"-" ({_between(max(1, -high), -low)})')
    if high >= 0:
        options.append(_between(max(0, low), high))
    return " | ".join(options)


def numbers(low: int, high: int, low_open: bool, high_open: bool) -> str:
    """The numbers from `low` to `high`, without the bound itself where it is open.

    Needs -RANGE_MAX <= low <= high <= RANGE_MAX, and a number in between.
    """
    options = []
    if low < 0:
        # Zero is written without a minus, below.
        near, near_open = (0, True) if high >= 0 else (-high, high_open)
        options.append(f'"-" ({_reals(near, -low, near_open, low_open)})')
    if high > 0 or (high == 0 and not high_open):
        near, near_open = (0, False) if low < 0 else (low, low_open)
        options.append(_reals(near, high, near_open, high_open))
    return " | ".join(options)


def _reals(low: int, high: int, low_open: bool, high_open: bool) -> str:
    """The numbers from `low` >= 0 to `high`, at least one."""
    if low == high:
        return f'"{low}" {_ZEROS}'
    options = [f'"{low}" {_above_zero()}' if low_open else f'"{low}" {_FRACTION}']
    if low + 1 < high:
        options.append(f"({_between(low + 1, high - 1)}) {_FRACTION}")
    if not high_open:
        options.append(f'"{high}" {_ZEROS}')
    return " | ".join(options)


def _above_zero() -> str:
    """A fraction that is not zero."""
    more = [f" [0-9]{{0,{digits}}}" if digits else "" for digits in reversed(range(FRACTION_DIGITS))]
    options = (f'"{"0" * zeros}" [1-9]{more[zeros]}' for zeros in range(FRACTION_DIGITS))
    return f'"." ({" | ".join(options)})'


def _between(low: int, high: int) -> str:
    """The whole numbers from `low` >= 0 to `high` >= `low`, length by length."""
    options = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        last = min(high, 10**digits - 1)
        options.append(_same_length(str(first), str(last)))
    return " | ".join(options)


def _same_length(low: str, high: str) -> str:
    """The digit strings from `low` to `high`, both of one length."""
    rest = len(low) - 1
    if rest < 0:
        return '""'
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{rest + 1}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" {_same_length(low[1:], high[1:])}' if rest else f'"{low[0]}"'
    if not rest:
        return f"[{low}-{high}]"
    options = [f'"{low[0]}" {_same_length(low[1:], "9" * rest)}']
    if int(low[0]) + 1 < int(high[0]):
        options.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}] [0-9]{{{rest}}}")
    options.append(f'"{high[0]}" {_same_length("0" * rest, high[1:])}')
    return f"({' | '.join(options)})"
