"""The engine: from per-example losses to one noisy gradient, and nothing un-noised past it.

    engine.accumulate(losses, units)   for every micro-batch of a logical batch (for none, if the draw was empty)
    engine.release()                   once per logical step: clip has happened, noise is added, ``.grad`` is written
    optimizer.step()

At step t, with the sampled units u, the released gradient is (Abadi et al. 2016, Algorithm 1; Poisson sampling)

    ( Σ_u g_u · factor(‖g_u‖)  +  N(0, σ²C²I) ) / B      with the public constant B = q·N₀.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dpft.errors import BudgetError, BypassError, GuaranteeError, SubsetError
from dpft.gradients.capture import Capture
from dpft.gradients.gradients import Gradients
from dpft.privacy.noise import Randomness, SecureRandomness
from dpft.privacy.plan import Plan

WORKSPACE_BYTES = 1 << 28  # more makes no example faster on a CPU


class Engine:
    """Turns per-example losses into DP gradients for every parameter of ``model`` that requires one.

    Attach it with ``with Engine(...) as engine:`` or :meth:`attach`; the model stays what it was, and after
    :meth:`detach` nothing of dpft is left on it.

    Args:
        model: its trainable parameters (``requires_grad``) are the subset; everything else is frozen.
        plan: clip, noise, normaliser and number of steps.
        randomness: where noise comes from. The default is the only source that gives a guarantee.
        before_release: called with the release's number (1, 2, ...) before anything of it exists: the place to
            charge a budget. If it raises, nothing is released.

    Attributes:
        workspace_bytes: bounds a micro-batch: each of its examples needs 4 bytes for each parameter whose gradient is made.

    Guarantee:
        Between :meth:`release` calls nothing computed from the losses reaches a parameter or a ``.grad``. Each
        release has sensitivity ``plan.clip.sensitivity`` per unit before division, and gets exactly one draw of
        noise with standard deviation ``plan.noise_std``, empty draws included. At most ``plan.steps`` releases.

    Raises:
        SubsetError: nothing in the model is trainable, or no gradient can pass it.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        randomness: Randomness | None = None,
        before_release: Callable[[int], None] | None = None,
    ) -> None:
        self.plan = plan
        self.randomness = randomness or SecureRandomness()
        self.capture = Capture(model)
        if not self.capture.slots:
            raise SubsetError(
                "No parameter of the model requires a gradient: select a subset before making the engine."
            )
        frozen_in = next((name for name, p in model.named_parameters() if p.is_inference()), None)
        if frozen_in is not None:
            raise SubsetError(
                f"{frozen_in} was made under torch.inference_mode, so no gradient can pass it: load the model outside of that context."
            )
        self.workspace_bytes = WORKSPACE_BYTES
        self.steps_released = 0
        self._nonfinite: Tensor | int = 0
        self._before_release = before_release
        self._model_parameters = {id(p): name for name, p in model.named_parameters()}
        self._watched: list[tuple[str, nn.Parameter, bool]] = []  # all of the model's, and which of them train
        self._total: Tensor | None = None
        self._closed: set = set()
        self._open: tuple[object, Tensor, int] | None = None  # the unit that the next micro-batch may continue
        self._released: dict[int, tuple[Tensor, int]] = {}  # by parameter: the gradient made and its version then
        self._unstepped: set[int] = set()  # parameters whose released gradient no optimizer has used yet
        self._guard = None

    def __enter__(self) -> "Engine":
        self.attach()
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def attach(self) -> None:
        if self._guard is None:
            self.capture.attach()
            self._guard = register_optimizer_step_pre_hook(self._check_step)

    def detach(self) -> None:
        if self._guard is not None:
            self.capture.detach()
            self._guard.remove()
            self._guard = None

    def max_examples(self, tokens: int) -> int:
        """How many examples of so many tokens a micro-batch may hold, by the gradients that must be made of each at once."""
        if self.capture.one_by_one:
            return 1
        whole_units = self.plan.examples_per_unit > 1  # their examples' gradients are added up, so they must be made
        made = sum(
            slot.parameter.numel() for slot in self.capture.slots if whole_units or tokens > slot.longest_by_norm
        )
        return max(1, self.workspace_bytes // max(4 * made, 1))

    # -- one logical step ----------------------------------------------------------------------------------------

    def accumulate(self, losses: Tensor, units: Sequence | None = None) -> None:
        """Back-propagate one micro-batch and add its clipped unit gradients to the sum of this logical step.

        If it fails, the whole logical step is forgotten: give all of it again.

        Args:
            losses: ``(B,)``, the loss of each example by itself.
            units: ``(B,)`` hashable identifiers; by default each example is a unit. A unit's examples may spread over
                consecutive micro-batches: its gradient is complete before its norm is taken.

        Raises:
            GuaranteeError: losses are not ``(B,)`` or more than :meth:`max_examples` allows where each has a backward pass of its own, the
                trainable parameters changed, or a unit came back after its gradient had been clipped.
            ExactnessError, BypassError: see :mod:`dpft.errors`.
        """
        self._check_ready(losses, units)
        if self._total is None:
            self._refuse_strangers(losses)
        try:
            # Autocast would round norms to half precision, but not the sum, whose bound they are.
            with torch.autocast(losses.device.type, enabled=False):
                self._accumulate(losses, units)
        except BaseException:
            self.discard()  # a part may have been added already, which another try would add again
            raise

    def _accumulate(self, losses: Tensor, units: Sequence | None) -> None:
        gradients = self.capture.gradients(losses)
        if units is None:
            return self._add(gradients)
        units = list(units)
        whole = self.plan.examples_per_unit == 1 and len(set(units)) == len(units)
        if whole and self._open is None:  # an open unit might go on here
            self._refuse_returned(units)
            self._closed.update(units)
            return self._add(gradients)
        self._accumulate_units(gradients.rows(self.capture.size), units)

    def release(self) -> None:
        """Add one draw of noise to the sum, divide by the public batch size and write every ``.grad``.

        Raises:
            BudgetError: the plan's number of steps has been released.
        """
        if self.steps_released >= self.plan.steps:
            raise BudgetError(
                f"All {self.plan.steps:,} planned steps have been released, and one more would exceed the stated epsilon: "
                "make a plan with more steps."
            )
        if self._before_release is not None:
            self._before_release(self.steps_released + 1)
        self._close_open_unit()
        flat = self._sum()
        if self.plan.noise_multiplier > 0:
            start = 0
            for noise in self.randomness.gaussians(self.capture.size, flat.device):
                part = flat[start : start + len(noise)]
                part.copy_(part.double() + noise.to(part.device) * self.plan.noise_std)
                start += len(noise)
        flat /= self.plan.expected_batch_size
        self._released.clear()
        for slot in self.capture.slots:
            gradient = slot.view(flat).to(slot.parameter.dtype)
            slot.parameter.grad = gradient
            self._released[id(slot.parameter)] = (gradient, gradient._version)
        self._unstepped = set(self._released)
        self.steps_released += 1
        self.discard()

    def discard(self) -> None:
        """Forget what was accumulated since the last release; nothing of it was released."""
        self._total, self._open = None, None
        self._closed.clear()

    @property
    def nonfinite_units(self) -> int:
        """How many units had a non-finite gradient and contributed nothing. Private."""
        return int(self._nonfinite)

    @property
    def guarantee(self) -> str:
        """The claim after the steps released so far, or NOT PRIVATE and why."""
        if not self.randomness.private:
            return f"NOT PRIVATE: {self.steps_released:,} steps with noise from a seed, which anyone can subtract."
        if self.steps_released == 0:
            return "Nothing was released."
        return self.plan.guarantee(self.steps_released)

    # -- units ---------------------------------------------------------------------------------------------------

    def _accumulate_units(self, rows: Tensor, units: list) -> None:
        order = list(dict.fromkeys(units))
        index = torch.tensor([order.index(unit) for unit in units], device=rows.device)
        counts = torch.bincount(index, minlength=len(order)).to(rows.dtype)
        if len(order) < len(units):
            rows = rows.new_zeros(len(order), rows.shape[1]).index_add_(0, index, rows)
        if self._open is not None and self._open[0] == order[0]:
            rows[0] += self._open[1]
            counts[0] += self._open[2]
            self._open = None
        self._close_open_unit()
        self._refuse_returned(order)
        self._open = (order[-1], rows[-1].clone(), counts[-1].clone())
        self._closed.update(order[:-1])
        self._add_units(rows[:-1], counts[:-1])

    def _close_open_unit(self) -> None:
        if self._open is not None:
            unit, row, count = self._open
            self._open = None
            self._closed.add(unit)
            self._add_units(row.unsqueeze(0), count.unsqueeze(0))

    def _refuse_returned(self, units: list) -> None:
        returned = self._closed.intersection(units)
        if returned:
            raise GuaranteeError(
                f"Unit {next(iter(returned))!r} came back after its gradient had been clipped, so it would count twice: "
                "give all examples of a unit in consecutive rows of one logical batch."
            )

    def _add_units(self, rows: Tensor, counts: Tensor) -> None:
        """Add ``(U, P)`` whole unit gradients, each summed over ``counts`` ``(U,)`` examples."""
        mean = self.plan.unit_gradient == "mean" and bool((counts != 1).any())
        self._add(Gradients(rows / counts.unsqueeze(1) if mean else rows))

    def _add(self, gradients: Gradients) -> None:
        """Clip whole unit gradients and add them up."""
        norms = gradients.norms()
        finite = torch.isfinite(norms)
        # On a GPU to look is to wait, which costs more than to forget nobody; large gradients would be copied, so there it looks.
        if (norms.is_cuda and not gradients.large) or not finite.all():
            # A factor of zero would not do: 0 · inf is NaN, which would poison the sum and reveal the unit.
            gradients.forget(~finite)
            self._nonfinite += (~finite).sum()
            norms = torch.where(finite, norms, 1.0)
        gradients.add_to(self._sum(), self.plan.clip.factors(norms))

    def _sum(self) -> Tensor:
        if self._total is None:
            self._total = torch.zeros(self.capture.size, device=self.capture.slots[0].parameter.device)
        return self._total

    # -- defences ------------------------------------------------------------------------------------------------

    def _check_ready(self, losses: Tensor, units: Sequence | None) -> None:
        if self._guard is None:
            raise GuaranteeError(
                "The engine is not attached to its model: use it as a context, or call engine.attach()."
            )
        if losses.dim() != 1 or len(losses) == 0:
            raise GuaranteeError(
                f"losses has shape {tuple(losses.shape)}, but each example needs a loss of its own, or one record would "
                "rescale the others before clipping: pass (B,) losses, not their mean."
            )
        if self.capture.one_by_one and len(losses) > 1:
            raise GuaranteeError(
                f"{len(losses)} losses of one forward pass were given, but each example has a backward pass of its own ({self.capture.one_by_one}), in "
                "which a neighbour's value that is not finite would silence it: give one example at a time, as engine.max_examples says."
            )
        if units is not None and len(units) != len(losses):
            raise GuaranteeError(
                f"{len(units)} units were given for {len(losses)} losses: pass one unit for each example."
            )
        if self._total is None:  # a large model's parameters are not looked up again for every micro-batch
            known = {id(slot.parameter) for slot in self.capture.slots}
            self._watched = [(n, p, id(p) in known) for n, p in self.capture.model.named_parameters()]
        for name, parameter, trains in self._watched:
            if parameter.requires_grad != trains:
                change = "became trainable" if parameter.requires_grad else "was frozen"
                raise GuaranteeError(
                    f"{name} {change} after the engine was made, so the engine would miss it: make a new engine."
                )
            if parameter.grad is not None and not self._is_released(parameter) and parameter.grad.any():
                raise BypassError(
                    f"{name} has a gradient that the engine did not make: remove the stray backward pass before engine.accumulate."
                )
            if trains:
                parameter.grad = None
        self._released.clear()

    def _refuse_strangers(self, losses: Tensor) -> None:
        """Raises BypassError: the losses come from trainable parameters of another model, whose gradients nothing would clip."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.capture.model.parameters()}
        waiting, seen = [losses.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            # What shares memory with a parameter is a view of it, as PEFT transposes a frozen weight.
            if isinstance(leaf, nn.Parameter) and leaf.untyped_storage().data_ptr() not in own:
                raise BypassError(
                    f"The losses depend on a trainable parameter of shape {tuple(leaf.shape)} that is not the engine's model's, so its gradient "
                    "would be neither clipped nor noised: make the engine of the whole model that the losses come from."
                )
            waiting += [function for function, _ in node.next_functions]

    def _is_released(self, parameter: nn.Parameter) -> bool:
        gradient, version = self._released.get(id(parameter), (None, None))
        return parameter.grad is gradient and gradient is not None and gradient._version == version

    def _check_step(self, optimizer: Optimizer, *_) -> None:
        """Before any optimizer steps: every gradient on this model is one that the engine released for this step."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._model_parameters.get(id(parameter))
                if name is None or parameter.grad is None:
                    continue
                if not self._is_released(parameter) or id(parameter) not in self._unstepped:
                    raise BypassError(
                        f"An optimizer is about to step {name} with a gradient that the engine did not release for this "
                        "step, so it may be neither clipped nor noised: call engine.accumulate and engine.release first."
                    )
                self._unstepped.discard(id(parameter))
