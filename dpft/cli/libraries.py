"""What other libraries say of themselves is not shown on a command's standard error; errors are, and so is all of
dpft's."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

BARS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


@contextmanager
def only_our_messages() -> Iterator[None]:
    """Hide other libraries' log lines below errors, their warnings and their bars while entered.

    A variable of the environment that is set, or ``python -W``, is respected: it says what to show.
    """
    ours = [name for name in BARS if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "1"))
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"dpft(\.|$)")
            yield
    finally:
        logging.disable(before)
        for name in ours:
            os.environ.pop(name, None)
