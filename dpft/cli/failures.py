"""What the command line says of an error that is no bug: one sentence, and the exit code."""

import errno
import re

from dpft.errors import BudgetError, DPFTError, first_line

WAYS_OUT = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose another path",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a folder",
    errno.EEXIST: "choose another path",
    errno.ENOSPC: "free space on that disk, or choose another",
    errno.EDQUOT: "free space on that disk, or choose another",
}


def explained(error: BaseException) -> tuple[str, int] | None:
    """The sentence, notes included, and the exit code; None for a bug, which keeps its traceback."""
    found = _explained(error)
    if found is None:
        return None
    sentence, code = found
    return " ".join([sentence, *getattr(error, "__notes__", ())]), code


def pipe_is_closed(error: BaseException) -> bool:
    """Whether the reader of the output left, as ``| head`` does; Windows reports EINVAL, without a file."""
    return isinstance(error, OSError) and (
        error.errno == errno.EPIPE or (error.errno == errno.EINVAL and error.filename is None)
    )


def _explained(error: BaseException) -> tuple[str, int] | None:
    if isinstance(error, KeyboardInterrupt):
        return "Stopped. What was released before stays charged.", 130
    if isinstance(error, DPFTError):
        return f"Error: {error}", 3 if isinstance(error, BudgetError) else 1
    if isinstance(error, UnicodeError):
        return f"Error: A file or an argument is not UTF-8 text ({first_line(error)}): save it as UTF-8.", 1
    number = _errno(error)
    if number is None:
        return None
    file = getattr(error, "filename", None)
    what = "A file" if file is None else file
    reason = getattr(error, "strerror", None) or first_line(error)
    return f"Error: {what} cannot be read or written ({reason}): {WAYS_OUT.get(number, 'check the path')}.", 1


def _errno(error: BaseException) -> int | None:
    """The operating system's number, also from libraries in Rust, such as safetensors, which have it in their text."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None
