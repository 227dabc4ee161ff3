"""Where per-example gradients are captured: each trainable parameter, and the modules that are hooked for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from dpft.gradients.findings import CaptureChoices
from dpft.gradients.rules import IMPLICIT, Rule, rule_for
from dpft.gradients.rules.linear import longest_by_norm

MAX_LEVEL = 2
LARGE = 1 << 16  # a parameter of at least this many scalars keeps its gradients out of the flat workspace
RULE, FUNCTIONAL, PER_EXAMPLE = "rule", "functional", "per example"


@dataclass
class TrainableParameter:
    """One trainable parameter and the modules at which its uses are captured.

    Attributes:
        start: the position of its first scalar among all P trainable scalars.
        modules: the modules to hook, at first the layers that own the parameter.
        level: how often ``modules`` were replaced by the modules around them.
    """

    name: str
    parameter: nn.Parameter
    start: int
    modules: list[nn.Module]
    level: int = 0
    technique: str = RULE

    @cached_property
    def large(self) -> bool:
        return self.parameter.numel() >= LARGE

    @property
    def longest_by_norm(self) -> float:
        """The most tokens for which its per-example gradients stay implicit.

        It is 0 where they are always materialised, and infinity for embeddings.
        """
        kinds = [type(module) for module in self.modules]
        linear = sum(kind is not nn.Embedding for kind in kinds)
        implicit = self.large and self.technique == RULE and all(kind in IMPLICIT for kind in kinds) and linear <= 1
        if not implicit or self.parameter.dim() != 2:
            return 0
        height, width = self.parameter.shape
        return longest_by_norm(height, width) if linear else inf

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.parameter.numel())

    def view(self, flat: Tensor) -> Tensor:
        """``(P,)`` or ``(B, P)`` to this parameter's ``(*shape)`` or ``(B, *shape)``."""
        shape, strides = flat.shape[:-1] + self.parameter.shape, flat.stride()[:-1] + self._strides
        return flat.as_strided(shape, strides, flat.storage_offset() + self.start)

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return torch.empty(self.parameter.shape, device="meta").stride()


@dataclass
class HookedModule:
    """A hooked module and the trainable parameters that it serves.

    Attributes:
        own_forward: the ``forward`` that was set on the instance before the hook replaced it.
        batched: for each form of call, which of its tensors have the batch as leading dimension. While the preflight
            runs, each call can only clear flags: a tensor whose length equals B by coincidence shows at another B.
            Afterwards the flags are fixed, and a call of an unknown form is refused.
        sizes: the batch sizes B that it has served.
        random: whether it drew random numbers. A second forward pass would draw others.
    """

    name: str
    module: nn.Module
    trainables: list[TrainableParameter]
    own_forward: Callable[..., object] | None = None
    batched: dict[str, list[bool]] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=set)
    random: bool = False

    @cached_property
    def rule(self) -> Rule | None:
        """The closed form, if this very class has one and the layer owns all of ``trainables``."""
        own = {id(parameter) for parameter in parameters_at(self.module)}
        return rule_for(self.module) if all(id(one.parameter) in own for one in self.trainables) else None

    @cached_property
    def takes_half(self) -> bool:
        """Whether the rule itself keeps what half-precision tensors would lose."""
        return type(self.module) in (nn.Linear, Conv1D)

    @cached_property
    def needs_input(self) -> bool:
        """Whether a gradient here depends on the layer's input. A linear layer's bias needs the output gradient
        only."""
        if type(self.module) not in (nn.Linear, Conv1D):
            return True
        return any(one.parameter is not self.module.bias for one in self.trainables)

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


class CaptureMap:
    """The trainable parameters of a model and the modules that are hooked for them.

    At first each parameter is captured at its own layer. The preflight moves it to a module around that by
    :meth:`lift`.

    Attributes:
        trainables: one :class:`TrainableParameter` for each trainable parameter; a tied one is listed once.
        hooked_modules: the modules to hook.
        size: P, the number of trainable scalars.
        small_size: the number of scalars in parameters that are not large. They come first.
        one_by_one: why no module is hooked and each example needs its own backward pass; None if that is not so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trainables: list[TrainableParameter] = []
        self.hooked_modules: list[HookedModule] = []
        self.size = self.small_size = 0
        self.one_by_one: str | None = None
        self._parents: dict[int, list[nn.Module]] = {}
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for child in module.children():
                self._parents.setdefault(id(child), []).append(module)
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(module)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # A shared parameter is often listed at the whole model too. Capture.gradients finds a use there.
                modules = [module for module in self._callable(owners[id(parameter)]) if not self._too_far(module)]
                self.trainables.append(TrainableParameter(name, parameter, 0, modules))
                if not modules:
                    self.one_by_one = f"{name}: only the whole model uses it"
        for trainable in sorted(self.trainables, key=lambda trainable: trainable.large):
            trainable.start = self.size
            self.size += trainable.parameter.numel()
            self.small_size += 0 if trainable.large else trainable.parameter.numel()
        self._group()

    def lift(self, trainables: Sequence[TrainableParameter], reason: str) -> None:
        """Capture these parameters at the modules around their present ones. Where that is too far, go one by one."""
        for trainable in trainables:
            parents = [parent for module in trainable.modules for parent in self._parents.get(id(module), [])]
            around = self._callable(parents)
            if not around or any(map(self._too_far, around)) or trainable.level == MAX_LEVEL:
                return self.go_one_by_one(reason)
            trainable.modules, trainable.level = around, trainable.level + 1
        self._group()

    def go_one_by_one(self, reason: str) -> None:
        """Hook nothing: from now on each example gets a plain backward pass of its own."""
        self.one_by_one = reason
        self._group()

    def choices(self) -> CaptureChoices:
        """How each parameter is captured now."""
        return CaptureChoices(
            one_by_one=self.one_by_one,
            levels={trainable.name: trainable.level for trainable in self.trainables if trainable.level},
            batched={hooked.name: dict(hooked.batched) for hooked in self.hooked_modules},
        )

    def apply(self, choices: CaptureChoices) -> None:
        """Capture as the map of the same model did whose :meth:`choices` these are."""
        for trainable in self.trainables:
            for _ in range(choices.levels.get(trainable.name, 0)):
                self.lift([trainable], "")
        if choices.one_by_one:
            self.go_one_by_one(choices.one_by_one)
        for hooked in self.hooked_modules:
            hooked.batched = choices.batched.get(hooked.name, {})

    def _group(self) -> None:
        """List the modules to hook, each with the parameters that it serves."""
        served: dict[int, tuple[nn.Module, list[TrainableParameter]]] = {}
        for trainable in self.trainables:
            for module in trainable.modules:
                served.setdefault(id(module), (module, []))[1].append(trainable)
        names = {id(module): name for name, module in self.model.named_modules()}
        self.hooked_modules = [] if self.one_by_one else [HookedModule(names[key], *one) for key, one in served.items()]
        for trainable in self.trainables:
            trainable.technique = PER_EXAMPLE if self.one_by_one else RULE
        for hooked in self.hooked_modules:
            if hooked.rule is None:
                for trainable in hooked.trainables:
                    trainable.technique = FUNCTIONAL

    def _callable(self, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """These modules. A list, dictionary or parametrization is replaced by the modules around it that are called."""
        found: list[nn.Module] = []
        for module in modules:
            inner = any(isinstance(parent, ParametrizationList) for parent in self._parents.get(id(module), ()))
            if inner or type(module).forward is nn.Module.forward or isinstance(module, ParametrizationList):
                found += self._callable(self._parents.get(id(module), []))
            else:
                found.append(module)
        return list({id(module): module for module in found}.values())

    def _too_far(self, module: nn.Module) -> bool:
        """Whether the module is the whole model or holds its list of blocks.

        To differentiate such a module again would double the run's time.
        """
        whole = module is self.model and next(module.children(), None) is not None
        return whole or any(isinstance(m, nn.ModuleList) and len(m) > 1 for m in module.modules())


def parameters_at(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that a rule of this layer serves: its own, and those that parametrize them."""
    inner = getattr(layer, "parametrizations", {})
    return [*layer.parameters(recurse=False), *(p for key in inner for p in inner[key].parameters())]
