"""dpft: fine-tune Hugging Face models under differential privacy, on a sparse subset of their parameters."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of _HOMES again, for type checkers and editors, which do not run __getattr__
    from dpft.errors import (
        BudgetError as BudgetError,
        BypassError as BypassError,
        DPFTError as DPFTError,
        ExactnessError as ExactnessError,
        GuaranteeError as GuaranteeError,
        IsolationError as IsolationError,
        LedgerError as LedgerError,
        PlanError as PlanError,
        RecipeError as RecipeError,
        SubsetError as SubsetError,
    )
    from dpft.gradients.engine import Engine as Engine
    from dpft.gradients.preflight import Preflight as Preflight, preflight as preflight
    from dpft.ledger import Dataset as Dataset, Ledger as Ledger
    from dpft.privacy.clipping import AutoClip as AutoClip, FlatClip as FlatClip, PerLayerClip as PerLayerClip
    from dpft.privacy.events import Event as Event
    from dpft.privacy.mechanisms.statistics import Statistics as Statistics
    from dpft.privacy.noise import SecureRandomness as SecureRandomness, SeededRandomness as SeededRandomness
    from dpft.privacy.plan import Plan as Plan
    from dpft.recipe import Recipe as Recipe
    from dpft.report import write_card as write_card
    from dpft.subset import (
        All as All,
        Bias as Bias,
        Head as Head,
        LastBlocks as LastBlocks,
        Layers as Layers,
        Lora as Lora,
        Norms as Norms,
        Sparse as Sparse,
        Subset as Subset,
        Tuner as Tuner,
        load_weights as load_weights,
        replace_batchnorm as replace_batchnorm,
        save_weights as save_weights,
    )
    from dpft.tasks import (
        CausalLM as CausalLM,
        LabelledTask as LabelledTask,
        SequenceClassification as SequenceClassification,
        Task as Task,
    )
    from dpft.training.batches import Examples as Examples, LogicalBatches as LogicalBatches
    from dpft.workflows.compare import compare as compare
    from dpft.workflows.preflight import preflight_recipe as preflight_recipe
    from dpft.workflows.sweep import sweep as sweep
    from dpft.workflows.train import train as train
    from dpft.tasks.pooling import mean_pooled as mean_pooled
    from dpft.training.head import HeadSession as HeadSession
    from dpft.training.options import SessionOptions as SessionOptions
    from dpft.training.session import Session as Session
    from dpft.training.trainer import DPTrainer as DPTrainer, DPTrainerMixin as DPTrainerMixin

_HOMES = {
    "AutoClip": "dpft.privacy.clipping",
    "FlatClip": "dpft.privacy.clipping",
    "PerLayerClip": "dpft.privacy.clipping",
    "Statistics": "dpft.privacy.mechanisms.statistics",
    "Plan": "dpft.privacy.plan",
    "SecureRandomness": "dpft.privacy.noise",
    "SeededRandomness": "dpft.privacy.noise",
    "Recipe": "dpft.recipe",
    "Subset": "dpft.subset",
    "All": "dpft.subset",
    "Bias": "dpft.subset",
    "Head": "dpft.subset",
    "LastBlocks": "dpft.subset",
    "Layers": "dpft.subset",
    "Lora": "dpft.subset",
    "Norms": "dpft.subset",
    "Sparse": "dpft.subset",
    "Tuner": "dpft.subset",
    "load_weights": "dpft.subset",
    "replace_batchnorm": "dpft.subset",
    "save_weights": "dpft.subset",
    "Engine": "dpft.gradients.engine",
    "Preflight": "dpft.gradients.preflight",
    "preflight": "dpft.gradients.preflight",
    "mean_pooled": "dpft.tasks.pooling",
    "CausalLM": "dpft.tasks",
    "LabelledTask": "dpft.tasks",
    "SequenceClassification": "dpft.tasks",
    "Task": "dpft.tasks",
    "DPTrainer": "dpft.training.trainer",
    "DPTrainerMixin": "dpft.training.trainer",
    "Examples": "dpft.training.batches",
    "LogicalBatches": "dpft.training.batches",
    "HeadSession": "dpft.training.head",
    "Session": "dpft.training.session",
    "SessionOptions": "dpft.training.options",
    "compare": "dpft.workflows.compare",
    "preflight_recipe": "dpft.workflows.preflight",
    "sweep": "dpft.workflows.sweep",
    "train": "dpft.workflows.train",
    "write_card": "dpft.report",
    "DPFTError": "dpft.errors",
    "RecipeError": "dpft.errors",
    "PlanError": "dpft.errors",
    "SubsetError": "dpft.errors",
    "GuaranteeError": "dpft.errors",
    "ExactnessError": "dpft.errors",
    "IsolationError": "dpft.errors",
    "BypassError": "dpft.errors",
    "BudgetError": "dpft.errors",
    "LedgerError": "dpft.errors",
    "Dataset": "dpft.ledger",
    "Ledger": "dpft.ledger",
    "Event": "dpft.privacy.events",
}

__all__ = sorted(_HOMES)
__version__ = "0.2.0"


def __getattr__(name: str):
    # Loaded on first use, so that `dpft --help` and the report need not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dpft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
