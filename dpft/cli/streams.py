"""Whatever dpft prints reaches every terminal, pipe and file: what a stream cannot encode is spelled out in ASCII."""

import codecs
import sys
import unicodedata

SPELLED = {
    **{"ε": "epsilon", "δ": "delta", "σ": "sigma", "μ": "mu", "Σ": "sum", "‖": "|"},
    **{"≤": "<=", "≥": ">=", "±": "+-", "×": "x", "·": "*", "√": "sqrt ", "→": "->", "½": "1/2"},
    **{"–": "-", "—": "-", "−": "-", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "━": "-"},
}


def spell_out() -> None:
    """Let standard output and standard error encode every text.

    A pipe on Windows has a code page such as cp1252, which lacks ε. Its encoding stays, because the reader decodes by
    it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None without a console, and whatever stands in for a stream elsewhere
            stream.reconfigure(errors=_spelled.__name__)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """An error handler of :mod:`codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    """The character's name in text, its base letter, or, where it has neither, its escape in Python."""
    if character in SPELLED:
        return SPELLED[character]
    base = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return base or character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_spelled.__name__, _spelled)
