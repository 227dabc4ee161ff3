"""dpft: fine-tune Hugging Face models under differential privacy, on a sparse subset of their parameters."""

from importlib import import_module

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
    "CausalLM": "dpft.tasks",
    "LabelledTask": "dpft.tasks",
    "SequenceClassification": "dpft.tasks",
    "Task": "dpft.tasks",
    "DPTrainer": "dpft.training.trainer",
    "DPTrainerMixin": "dpft.training.trainer",
    "Examples": "dpft.training.batches",
    "LogicalBatches": "dpft.training.batches",
    "train": "dpft.training.run",
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
    "Event": "dpft.privacy.composition",
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
