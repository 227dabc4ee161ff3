"""An optimizer may step a model only with the gradients that the engine released for this step."""

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dpft.errors import BypassError, GuaranteeError


class Guard:
    """Watches the parameters of ``model`` and every PyTorch optimizer while attached.

    Args:
        trainable: the parameters that the engine makes gradients for.
    """

    def __init__(self, model: nn.Module, trainable: list[nn.Parameter]) -> None:
        self._model, self._trainable = model, trainable
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._watched: list[tuple[str, nn.Parameter, bool]] = []  # each parameter of the model, and whether it trains
        self._released: dict[int, tuple[Tensor, int]] = {}  # by parameter: the released gradient and its version
        self._unstepped: set[int] = set()  # parameters whose released gradient no optimizer has used yet
        self._foreign: dict[int, weakref.ref[Tensor]] = {}  # leaves that losses depend on and the model lacks
        self._hook: RemovableHandle | None = None

    @property
    def attached(self) -> bool:
        return self._hook is not None

    def attach(self) -> None:
        self._hook = register_optimizer_step_pre_hook(self._check_step)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def release(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Write each ``.grad``. From now on an optimizer may use it once."""
        self._released.clear()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
            self._released[id(parameter)] = (gradient, gradient._version)
        self._unstepped = set(self._released)

    def check_parameters(self, *, new_step: bool) -> None:
        """Check before a micro-batch that the same parameters train, and that none has a gradient from elsewhere.

        Raises:
            GuaranteeError, BypassError: see :meth:`Engine.accumulate`.
        """
        if new_step:  # to list a large model's parameters for every micro-batch would take long
            known = set(map(id, self._trainable))
            self._watched = [(n, p, id(p) in known) for n, p in self._model.named_parameters()]
        for name, parameter, trains in self._watched:
            if parameter.requires_grad != trains:
                change = "became trainable" if parameter.requires_grad else "was frozen"
                raise GuaranteeError(
                    f"{name} {change} after the engine was made, so the engine would miss it: make a new engine."
                )
            if parameter.grad is not None and not self._is_released(parameter) and parameter.grad.any():
                raise BypassError(
                    f"{name} has a gradient that the engine did not make: remove the stray backward pass before "
                    "engine.accumulate."
                )
            if trains:
                parameter.grad = None
        self._released.clear()

    def foreign_leaves(self, losses: Tensor) -> list[Tensor]:
        """Tensors that the losses depend on, that require a gradient and that the model lacks. They are remembered.

        Raises:
            BypassError: one of them is a parameter, of another model.
        """
        own = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}
        waiting: list[Any] = [losses.grad_fn]
        seen: set[Any] = set()
        found: list[Tensor] = []
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in self._names:
                # A tensor that shares memory with a parameter is a view of it: PEFT transposes frozen weights.
                if isinstance(leaf, nn.Parameter) and leaf.untyped_storage().data_ptr() not in own:
                    raise BypassError(
                        f"The losses depend on a trainable parameter of shape {tuple(leaf.shape)} that is not the "
                        "engine's model's, so its gradient would be neither clipped nor noised: make the engine of "
                        "the whole model that the losses come from."
                    )
                found.append(leaf)
            waiting += [function for function, _ in node.next_functions]
        self._foreign = {key: leaf for key, leaf in self._foreign.items() if leaf() is not None}
        self._foreign |= {id(leaf): weakref.ref(leaf) for leaf in found}
        return found

    def _is_released(self, parameter: Tensor) -> bool:
        gradient, version = self._released.get(id(parameter), (None, None))
        return parameter.grad is gradient and gradient is not None and gradient._version == version

    def _check_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check before any optimizer steps that the engine released each gradient of this model for this step."""
        held: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in held:
            foreign = self._foreign.get(id(parameter))
            if foreign is not None and foreign() is parameter:
                raise BypassError(
                    f"An optimizer holds a tensor of shape {tuple(parameter.shape)} that the losses depend on and the "
                    "model lacks, so it would train without noise: register it as a parameter of the model before "
                    "the engine is made."
                )
        held = [parameter for parameter in held if id(parameter) in self._names]
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if held and closure is not None:
            raise BypassError(
                "optimizer.step was given a closure, which may make gradients after the engine's were checked: step "
                "without one, and choose an optimizer that needs none."
            )
        for parameter in held:
            if parameter.grad is None:
                continue
            released, version = self._released.get(id(parameter), (None, None))
            if released is not None and parameter.grad is released and released._version != version:
                raise BypassError(
                    f"The gradient of {self._names[id(parameter)]} was changed after engine.release, as by "
                    "clip_grad_norm_ or a gradient scaler, and what was added may be private: leave that out, as the "
                    "engine has clipped each unit."
                )
            if not self._is_released(parameter) or id(parameter) not in self._unstepped:
                raise BypassError(
                    f"An optimizer is about to step {self._names[id(parameter)]} with a gradient that the engine did "
                    "not release for this step, so it may be neither clipped nor noised: call engine.accumulate and "
                    "engine.release first."
                )
            self._unstepped.discard(id(parameter))
