"""Every error that dpft raises on purpose.

::

    DPFTError
    ├── RecipeError        a recipe, an argument or the data it names cannot be used as written
    ├── PlanError          the privacy parameters contradict each other or claim too much
    ├── SubsetError        no parameter, or not the expected one, would train
    ├── GuaranteeError     something would make the printed ε untrue
    │   ├── ExactnessError     a gradient is not the gradient of one example
    │   ├── IsolationError     one example changes what another one contributes
    │   └── BypassError        a step was tried with gradients that the engine did not make
    ├── BudgetError        the privacy budget does not allow it
    └── LedgerError        the ledger cannot be used, or does not verify

A message says, in one sentence, what is wrong with its numbers, why that matters and the way out.
The command line prints that sentence and no traceback.
"""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind, if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


class DPFTError(Exception):
    """Base of all errors that dpft raises on purpose."""


class RecipeError(DPFTError, ValueError):
    """A recipe, an argument or the data it names cannot be used as written."""


class PlanError(DPFTError, ValueError):
    """Privacy parameters contradict each other or claim too much."""


class SubsetError(DPFTError, ValueError):
    """The subset selects nothing, or cannot be applied to this model."""


class GuaranteeError(DPFTError, RuntimeError):
    """Going on would make the printed ε untrue."""


class ExactnessError(GuaranteeError):
    """A per-example gradient is not the gradient of exactly one example."""


class IsolationError(GuaranteeError):
    """One example changes the loss or the gradient of another one."""


class BypassError(GuaranteeError):
    """An optimizer step was tried with gradients that the engine did not make."""


class BudgetError(DPFTError, RuntimeError):
    """The privacy budget does not allow the operation."""


class LedgerError(DPFTError, RuntimeError):
    """The ledger cannot be read, written or believed; nothing was released on its account."""
