"""One form for a cell's value, whatever a file's format, library or editor made of it."""

import math
import re
import unicodedata
from datetime import UTC, date, datetime, time

MISSING = ""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}.*)?")
_WORDS = {word: MISSING for word in ("", "nan", "none", "null", "na", "n/a", "<na>", "nat")} | {
    "true": "1",
    "false": "0",
}


def canonical_value(value: object) -> str:
    """``value`` as text: the same for 7, 7.0 and "7 ", for NFC and NFD, for None, NaN and "".

    >>> [canonical_value(one) for one in (7, 7.0, " 7", "1e3", True, None, float("nan"), "a\\r\\n b ")]
    ['7', '7', '7', '1000', '1', '', '', 'a b']
    """
    if value is None:
        return MISSING
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, (bool, int, float)):
        return _number(value)
    if isinstance(value, (datetime, date)):
        return _moment(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{canonical_value(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(canonical_value, value)) + "]"
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "tolist"):  # arrays, tensors, and NumPy's own numbers and dates
        return canonical_value(value.tolist())
    if hasattr(value, "tobytes"):  # images
        return f"{getattr(value, 'size', '')}{value.tobytes().hex()}"
    return _text(str(value))


def is_text(canonical: str) -> bool:
    """Whether a canonical value is neither missing nor a number or a date."""
    return canonical != MISSING and not (_NUMBER.fullmatch(canonical) or _DATE.fullmatch(canonical))


def _text(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFC", text.replace("\ufeff", "")).split())
    if (word := _WORDS.get(text.lower())) is not None:
        return word
    if _NUMBER.fullmatch(text):
        return _number(float(text))
    if _DATE.fullmatch(text):
        try:
            return _moment(datetime.fromisoformat(text))
        except ValueError:
            pass
    return text


def _number(value: float) -> str:
    try:
        value = float(value)
    except OverflowError:
        return str(value)
    if math.isnan(value):
        return MISSING
    return f"{value:.15g}" if value else "0"


def _moment(value: date) -> str:
    """A day for midnight, and Greenwich's time where a zone is given."""
    if isinstance(value, datetime):
        if value.tzinfo is not None:
            value = value.astimezone(UTC).replace(tzinfo=None)
        if value.time() != time():
            return value.isoformat()
        value = value.date()
    return value.isoformat()
