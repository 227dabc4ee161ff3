"""Where per-example gradients are captured: for each trainable parameter, the modules to tap."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from dpft.gradients.rules import IMPLICIT, rule_for
from dpft.gradients.rules.linear import longest_by_norm

MAX_LEVEL = 2
LARGE = 1 << 16  # scalars from which a parameter's gradients are kept out of the flat workspace
RULE, FUNCTIONAL, PER_EXAMPLE = "rule", "functional", "per example"


@dataclass
class TrainableParameter:
    """Where one trainable parameter lives among all P trainable scalars, and at which modules its uses are captured."""

    name: str
    parameter: nn.Parameter
    start: int
    modules: list[nn.Module]
    level: int = 0  # how often the places were exchanged for the modules around them
    technique: str = RULE

    @cached_property
    def large(self) -> bool:
        return self.parameter.numel() >= LARGE

    @property
    def longest_by_norm(self) -> float:
        """The most tokens for which its per-example gradients need not be made; 0 where they must be, infinity for
        embeddings."""
        kinds = [type(place) for place in self.modules]
        linear = sum(kind is not nn.Embedding for kind in kinds)
        unmade = self.large and self.technique == RULE and all(kind in IMPLICIT for kind in kinds) and linear <= 1
        if not unmade or self.parameter.dim() != 2:
            return 0
        return longest_by_norm(*self.parameter.shape) if linear else inf

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
    """A tapped module and the trainables that it serves.

    ``batched`` tells which of a call's tensors have the batch as leading dimension, by the call's form. A tensor whose
    length merely equals B in one call is found out by a call with another B, so until the preflight has settled it the
    knowledge only narrows. Later it stays, and a call of a form that was not seen is refused.
    """

    name: str
    module: nn.Module
    trainables: list[TrainableParameter]
    hidden: Callable | None = None  # the forward, set on the instance, that the tap hides
    batched: dict[str, list[bool]] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=set)  # the batch sizes B that it has served
    random: bool = False  # whether it was seen to draw random numbers, which a second forward would not repeat

    @cached_property
    def rule(self) -> Callable | None:
        """The closed form, if there is one for this very class and all trainables are the layer's own."""
        own = {id(parameter) for parameter in parameters_at(self.module)}
        return rule_for(self.module) if all(id(trainable.parameter) in own for trainable in self.trainables) else None

    @cached_property
    def takes_half(self) -> bool:
        """Whether the rule itself keeps what half-precision tensors would lose."""
        return type(self.module) in (nn.Linear, Conv1D)

    @cached_property
    def needs_input(self) -> bool:
        """Whether a gradient here follows from the layer's input; a linear layer's bias has that of the output
        alone."""
        linear = type(self.module) in (nn.Linear, Conv1D)
        return not linear or any(trainable.parameter is not self.module.bias for trainable in self.trainables)


class CaptureMap:
    """What trains in a model and the modules that are hooked: at first each parameter at its own layer, then
    where the preflight lifts it.

    Attributes:
        trainables: one :class:`TrainableParameter` per trainable parameter, tied parameters once.
        hooked_modules: the modules to tap.
        size: P, the number of trainable scalars.
        small_size: of these the first so many, which belong to parameters that are not large.
        caches: buffers that a forward pass may make, because they come out the same for all examples.
        one_by_one: why nothing is tapped and each example has a backward pass of its own; None if it need not be.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trainables: list[TrainableParameter] = []
        self.hooked_modules: list[HookedModule] = []
        self.size = self.small_size = 0
        self.one_by_one: str | None = None
        self.caches: set[str] = set()
        self.forms_known = False  # whether the preflight has seen every form of call
        self._parents: dict[int, list[nn.Module]] = {}
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for child in module.children():
                self._parents.setdefault(id(child), []).append(module)
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(module)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # What layers share is often listed at the whole model as well; a use there would be found by rows().
                places = [place for place in self._callable(owners[id(parameter)]) if not self._too_far(place)]
                self.trainables.append(TrainableParameter(name, parameter, 0, places))
                if not places:
                    self.one_by_one = f"{name}: only the whole model uses it"
        for trainable in sorted(self.trainables, key=lambda trainable: trainable.large):
            trainable.start = self.size
            self.size += trainable.parameter.numel()
            self.small_size += 0 if trainable.large else trainable.parameter.numel()
        self.arrange()

    def _callable(self, modules: list[nn.Module]) -> list[nn.Module]:
        """These modules, or, for lists, dictionaries and parametrizations, the modules around them that are called."""
        found: list[nn.Module] = []
        for module in modules:
            inner = any(isinstance(parent, ParametrizationList) for parent in self._parents.get(id(module), ()))
            if inner or type(module).forward is nn.Module.forward or isinstance(module, ParametrizationList):
                found += self._callable(self._parents.get(id(module), []))
            else:
                found.append(module)
        return list({id(module): module for module in found}.values())

    def arrange(self) -> None:
        """Group the trainables by place; called again whenever the places change."""
        served: dict[int, tuple[nn.Module, list[TrainableParameter]]] = {}
        for trainable in self.trainables:
            for place in trainable.modules:
                served.setdefault(id(place), (place, []))[1].append(trainable)
        names = {id(module): name for name, module in self.model.named_modules()}
        self.hooked_modules = (
            [] if self.one_by_one else [HookedModule(names[key], *pair) for key, pair in served.items()]
        )
        for trainable in self.trainables:
            trainable.technique = PER_EXAMPLE if self.one_by_one else RULE
        for hooked in self.hooked_modules:
            if hooked.rule is None:
                for trainable in hooked.trainables:
                    trainable.technique = FUNCTIONAL

    def _too_far(self, module: nn.Module) -> bool:
        """Whether the module is the whole model or holds its list of blocks: to differentiate it again would double the
        run."""
        whole = module is self.model and next(module.children(), None) is not None
        return whole or any(isinstance(m, nn.ModuleList) and len(m) > 1 for m in module.modules())

    def lift(self, trainables: list[TrainableParameter], reason: str) -> None:
        """Capture these trainables at the modules around their places; where that is too far, everything one by one."""
        for trainable in trainables:
            around = self._callable(
                [parent for place in trainable.modules for parent in self._parents.get(id(place), [])]
            )
            if not around or any(map(self._too_far, around)) or trainable.level == MAX_LEVEL:
                return self.go_one_by_one(reason)
            trainable.modules, trainable.level = around, trainable.level + 1
        self.arrange()

    def go_one_by_one(self, reason: str) -> None:
        """Give up tapping: each example gets a plain backward pass of its own from now on."""
        self.one_by_one = reason
        self.arrange()

    def state(self) -> dict:
        """What the preflight decided, as plain values: :meth:`load_state` of the same model's capture takes it up."""
        return {
            "one_by_one": self.one_by_one,
            "caches": sorted(self.caches),
            "level": {trainable.name: trainable.level for trainable in self.trainables if trainable.level},
            "batched": {hooked.name: dict(hooked.batched) for hooked in self.hooked_modules},
        }

    def load_state(self, state: dict) -> None:
        for trainable in self.trainables:
            for _ in range(state["level"].get(trainable.name, 0)):
                self.lift([trainable], "")
        if state["one_by_one"]:
            self.go_one_by_one(state["one_by_one"])
        for hooked in self.hooked_modules:
            hooked.batched = state["batched"].get(hooked.name, {})
        self.caches = set(state["caches"])
        self.forms_known = True


def parameters_at(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that a rule of this layer gives: its own, and those that parametrize them."""
    inner = getattr(layer, "parametrizations", ())
    return [*layer.parameters(recurse=False), *(p for key in inner for p in inner[key].parameters())]
