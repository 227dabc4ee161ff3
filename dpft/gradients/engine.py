"""The engine: from per-example losses to one noisy gradient. Nothing without noise leaves it.

    engine.accumulate(losses, units)   for every micro-batch of a logical batch (an empty draw has none)
    engine.release()                   once for each logical step: adds noise and writes ``.grad``
    optimizer.step()

At step t, with the sampled units u, the released gradient is (Abadi et al. 2016, Algorithm 1; Poisson sampling)

    ( Σ_u g_u · factor(‖g_u‖)  +  N(0, σ²C²I) ) / B      with the public constant B = q·N₀.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpft.errors import BudgetError, GuaranteeError, SubsetError
from dpft.gradients.batch_gradients import BatchGradients
from dpft.gradients.capture import Capture
from dpft.gradients.groups import Layout
from dpft.gradients.guard import Guard
from dpft.gradients.precision import summing_device
from dpft.gradients.world import Alone, World
from dpft.privacy import clipping
from dpft.privacy.chance import StepChance
from dpft.privacy.clipping import Clip
from dpft.privacy.noise import NoiseStream, Randomness, SecureRandomness
from dpft.privacy.plan import Plan
from dpft.privacy.units import unit_ids

WORKSPACE_BYTES = 1 << 28  # on a CPU more makes no example faster


class Engine:
    """Turns per-example losses into DP gradients for every parameter of ``model`` that requires one.

    Attach it by ``with Engine(...) as engine:`` or :meth:`attach`. The model is not wrapped, and after :meth:`detach`
    nothing of dpft is left on it. While attached, the engine seeds the global random generators of Python, numpy and
    torch in secret. So no published seed tells what dropout, collators and tasks draw. Detaching restores the
    generators.

    Args:
        model: its trainable parameters (``requires_grad``) are the subset; everything else is frozen.
        plan: the mechanism, with its clip, noise and number of steps, and the normaliser. Its mechanism must release
            gradients.
        randomness: the source of noise. Only the default gives a guarantee.
        before_release: called with the release's number (1, 2, ...) before anything of it exists, as to charge a
            budget. If it raises, nothing is released.
        world: adds up the sums of several processes. By default this process is the only one.

    Attributes:
        workspace_bytes: limits a micro-batch. Each example needs 4 bytes for each parameter whose gradient is
            materialised.

    Guarantee:
        Between :meth:`release` calls nothing computed from the losses reaches a parameter or a ``.grad``. Each
        release has sensitivity ``engine.clip.sensitivity`` per unit before division. It gets exactly one draw of
        noise with standard deviation ``plan.mechanism.noise_std(engine.clip)``, also after an empty draw. There are
        at most ``plan.steps`` releases. A draw whose release fails is dropped; once charged, it counts as released.

    Raises:
        SubsetError: nothing in the model is trainable, or no gradient can pass it.
        GuaranteeError: the plan's mechanism does not release gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        randomness: Randomness | None = None,
        before_release: Callable[[int], None] | None = None,
        world: World | None = None,
    ) -> None:
        if plan.mechanism.releases != "gradients":
            raise GuaranteeError(
                f"The mechanism {plan.mechanism.name!r} releases {plan.mechanism.releases} and not gradients, so no "
                "engine can follow its events: choose another, such as 'dp-sgd'."
            )
        self.plan = plan
        self.randomness = randomness or SecureRandomness()
        self.capture = Capture(model)
        if not self.capture.map.trainables:
            raise SubsetError(
                "No parameter of the model requires a gradient: select a subset before making the engine."
            )
        frozen_in = next((name for name, p in model.named_parameters() if p.is_inference()), None)
        if frozen_in is not None:
            raise SubsetError(
                f"{frozen_in} was made under torch.inference_mode, so no gradient can pass it: load the model outside "
                "of that context."
            )
        self.workspace_bytes = WORKSPACE_BYTES
        self.steps_released = 0
        self._nonfinite: Tensor | int = 0
        self._unproven = 0  # releases before a preflight proved the gradients
        self._before_release, self._world = before_release, world or Alone()
        self._guard = Guard(model, [one.parameter for one in self.capture.map.trainables])
        self._chance = StepChance(self.randomness)
        self._clip_by(plan.clip)
        self._noise: NoiseStream | None = None
        self._total: Tensor | None = None
        self._tally: Tensor | float = 0.0  # what the mechanism counts of the units added so far; private
        self._closed: set[Any] = set()
        self._open: tuple[Any, Tensor, Tensor] | None = None  # the last unit, which the next micro-batch may continue

    def __enter__(self) -> "Engine":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        if not self._guard.attached:
            self.capture.attach()
            self._guard.attach()
            self._chance.__enter__()

    def detach(self) -> None:
        if self._guard.attached:
            self._chance.__exit__()
            self._guard.detach()
            self.capture.detach()

    def renew_chance(self) -> None:
        """Seed the step's dropout, masks and crops in secret, before its first forward pass.

        :meth:`release` does so for the next step.
        """
        self._chance.renew()

    def max_examples(self, tokens: int) -> int:
        """How many examples of this length fit in a micro-batch, by the gradients that are materialised at once."""
        if self.capture.map.one_by_one:
            return 1
        whole_units = self.plan.examples_per_unit > 1  # their gradients are summed, so all are materialised
        numbers = sum(
            one.parameter.numel() for one in self.capture.map.trainables if whole_units or tokens > one.longest_by_norm
        )
        return max(1, self.workspace_bytes // max(4 * numbers, 1))

    @property
    def clip(self) -> Clip:
        """The clip of the next release. It depends on earlier releases only, so it is public."""
        return self._clip

    def _clip_by(self, clip: Clip) -> None:
        sizes = {one.name: one.parameter.numel() for one in self.capture.map.trainables}
        self._clip, self._rule = clip, clip.over(sizes)
        groups = self._rule.groups
        self._layout = None if groups is None else Layout(self.capture.map.trainables, groups)

    @property
    def released_numbers(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights: the clip, if the mechanism moves it.

        Nothing here tells anything about the noise.
        """
        return {"clip": clipping.to_dict(self.clip)} if self.plan.mechanism.adapts else {}

    def take_up(self, released_numbers: dict[str, Any]) -> None:
        """Continue from a checkpoint's :attr:`released_numbers`.

        Raises:
            GuaranteeError: the mechanism moves its clip, and the checkpoint lacks it; or some units of this step were
                already clipped by another.
        """
        if not self.plan.mechanism.adapts:
            return
        if self._total is not None or self._open is not None:
            raise GuaranteeError(
                "A clip was given in the middle of a step, some of whose units were clipped by another, and noise "
                "follows one of them alone: give it before the step, or call engine.discard first."
            )
        if "clip" not in released_numbers:
            raise GuaranteeError(
                f"The checkpoint of a run by {self.plan.mechanism.name} holds no clip, which its next step needs: "
                "resume from one that this mechanism made."
            )
        self._clip_by(clipping.from_dict(released_numbers["clip"]))

    # -- one logical step ----------------------------------------------------------------------------------------

    def accumulate(self, losses: Tensor, units: Sequence[Any] | None = None) -> None:
        """Back-propagate one micro-batch and add its clipped unit gradients to the sum of this logical step.

        If it fails, the whole logical step is dropped: give all of it again.

        Args:
            losses: ``(B,)``, the loss of each example by itself.
            units: ``(B,)`` identifiers, such as a column of the batch. They are needed where the plan's unit is not
                ``"example"``; by default each example is a unit. A unit's examples may spread over consecutive
                micro-batches: its gradient is complete before its norm is computed.

        Raises:
            GuaranteeError: losses are not ``(B,)`` or more than :meth:`max_examples` allows where each has a backward
                pass of its own, units are missing, the trainable parameters changed, somebody seeded torch's generator
                during the step, or a unit came back after its gradient had been clipped.
            ExactnessError, BypassError: see :mod:`dpft.errors`.
        """
        try:
            ids = self._checked(losses, units)
            foreign = self._guard.foreign_leaves(losses)
            # Autocast would round norms to half precision, but not the sum that they bound.
            with torch.autocast(losses.device.type, enabled=False):
                self._accumulate(losses, ids)
            for leaf in foreign:
                leaf.grad = None  # neither clipped nor noised
        except BaseException:
            self.discard()  # a part may have been added already, and another try would add it again
            raise

    def _accumulate(self, losses: Tensor, units: list[Any] | None) -> None:
        gradients = self.capture.gradients(losses)
        if units is None:
            return self._add(gradients)
        whole = self.plan.examples_per_unit == 1 and len(set(units)) == len(units)
        if whole and self._open is None:  # the open unit may continue here
            self._refuse_returned(units)
            self._closed.update(units)
            return self._add(gradients)
        self._accumulate_units(gradients.rows(self.capture.map.size), units)

    def release(self) -> None:
        """Add one draw of noise to the sum, divide by the public batch size and write every ``.grad``.

        Raises:
            BudgetError: the plan's number of steps has been released.
        """
        try:
            if self.steps_released >= self.plan.steps:
                raise BudgetError(
                    f"All {self.plan.steps:,} planned steps have been released, and one more would exceed the stated "
                    "epsilon: make a plan with more steps."
                )
            if self._noise is None:  # it may not fit into memory, so it comes before the charge
                device = summing_device(self.capture.map.trainables[0].parameter.device)
                self._noise = self.plan.mechanism.noise(self.capture.map.size, self.randomness, device)
            if (before_release := self._before_release) is not None:
                self._world.first(lambda: before_release(self.steps_released + 1))
            self.steps_released += 1  # it was charged, so it counts whatever happens next
            self._unproven += self.capture.findings is None
            self._close_open_unit()
            gradients, clip = self._noisy_gradients(), self._next_clip()
            self._guard.release(gradients)
            if clip != self.clip:
                self._clip_by(clip)
        except BaseException:
            self._noise = None  # a stream with memory must have a row for each step: after a gap, another one begins
            raise
        finally:
            self.discard()  # a draw whose release failed must not be added to the next
        self.renew_chance()

    def _noisy_gradients(self) -> dict[nn.Parameter, Tensor]:
        """What is released. Noise is added in float64, and only the noisy mean is rounded to a parameter's type."""
        total, start = self._world.sum_(self._sum()), 0
        noise_std = self.plan.mechanism.noise_std(self.clip)
        if noise_std > 0:
            assert self._noise is not None  # release made it
            for noise in self._noise.following():
                total[start : start + len(noise)].add_(noise, alpha=noise_std)
                start += len(noise)
        total /= self.plan.expected_batch_size
        trainables = self.capture.map.trainables
        return {p: one.view(total).to(p.dtype).to(p.device) for one in trainables for p in [one.parameter]}

    def _next_clip(self) -> Clip:
        """The clip of the next step, from this step's noisy tally. It is released together with the gradient."""
        mechanism, tally = self.plan.mechanism, float(self._world.sum_(torch.as_tensor(self._tally)))
        if mechanism.tally_noise > 0:
            tally += mechanism.tally_noise * float(self.randomness.gaussian(1))
        return mechanism.next_clip(self.clip, tally, self.plan.expected_batch_size)

    def discard(self) -> None:
        """Drop what was accumulated since the last release. Nothing of it was released."""
        self._total, self._open = None, None
        self._tally = 0.0
        self._closed.clear()

    @property
    def nonfinite_units(self) -> int:
        """How many units had a non-finite gradient and contributed nothing. This number is private."""
        return int(self._nonfinite)

    @property
    def guarantee(self) -> str:
        """The claim after the steps released so far; or NOT PRIVATE or NOT PROVEN, and why."""
        if self._unproven and self.randomness.private:
            return (
                f"NOT PROVEN: {self._unproven:,} of {self.steps_released:,} steps were released before a preflight "
                "had compared the gradients with those of one example at a time: call dpft.preflight before the "
                "first release."
            )
        return self.plan.claim(self.steps_released, private=self.randomness.private)

    # -- units ---------------------------------------------------------------------------------------------------

    def _accumulate_units(self, rows: Tensor, units: list[Any]) -> None:
        order = list(dict.fromkeys(units))
        place = {unit: i for i, unit in enumerate(order)}
        index = torch.tensor([place[unit] for unit in units], device=rows.device)
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

    def _refuse_returned(self, units: list[Any]) -> None:
        returned = self._closed.intersection(units)
        if returned:
            raise GuaranteeError(
                f"Unit {next(iter(returned))!r} came back after its gradient had been clipped, so it would count "
                "twice: give all examples of a unit in consecutive rows of one logical batch."
            )

    def _add_units(self, rows: Tensor, counts: Tensor) -> None:
        """Add ``(U, P)`` complete unit gradients. Each is the sum over ``counts`` ``(U,)`` examples."""
        mean = self.plan.unit_gradient == "mean" and bool((counts != 1).any())
        self._add(BatchGradients(rows / counts.unsqueeze(1) if mean else rows))

    def _add(self, gradients: BatchGradients) -> None:
        """Clip complete unit gradients and add them up."""
        norms = gradients.norms() if self._layout is None else self._layout.norms(gradients)
        finite = torch.isfinite(norms) if self._layout is None else torch.isfinite(norms).all(1)
        # `finite.all()` synchronises with the GPU. Zeroing nothing is cheaper, unless large gradients would be copied.
        if (norms.is_cuda and not gradients.large) or not finite.all():
            # A factor of zero is not enough: 0 · inf is NaN, which would spoil the sum and reveal the unit.
            gradients.zero_examples(~finite)
            self._nonfinite += (~finite).sum()
            norms = torch.where(finite if self._layout is None else finite.unsqueeze(1), norms, 1.0)
        tally = self.plan.mechanism.tally(norms, self.clip)
        if tally is not None:
            self._tally = self._tally + tally.masked_fill(~finite, 0.0).sum().to(self._sum())
        factors = self._rule.factors(norms)
        if self._layout is None:
            gradients.add_to(self._sum(), factors)
        else:
            self._layout.add_to(self._sum(), gradients, factors)

    def _sum(self) -> Tensor:
        """``(P,)``, the sum of the clipped gradients so far. In float32, removing one unit could move it by more than
        the clip."""
        if self._total is None:
            device = summing_device(self.capture.map.trainables[0].parameter.device)
            self._total = torch.zeros(self.capture.map.size, dtype=torch.float64, device=device)
        return self._total

    # -- defences ------------------------------------------------------------------------------------------------

    def _checked(self, losses: Tensor, units: Sequence[Any] | None) -> list[Any] | None:
        """The micro-batch's unit identifiers, once all checks have passed."""
        if not self._guard.attached:
            raise GuaranteeError(
                "The engine is not attached to its model: use it as a context, or call engine.attach()."
            )
        if losses.dim() != 1 or len(losses) == 0:
            raise GuaranteeError(
                f"losses has shape {tuple(losses.shape)}, but each example needs a loss of its own, or one record "
                "would rescale the others before clipping: pass (B,) losses, not their mean."
            )
        if self.capture.map.one_by_one and len(losses) > 1:
            raise GuaranteeError(
                f"{len(losses)} losses of one forward pass were given, but each example has a backward pass of its "
                f"own ({self.capture.map.one_by_one}), in which a neighbour's value that is not finite would silence "
                "it: give one example at a time, as engine.max_examples says."
            )
        if units is None and self.plan.unit != "example":
            raise GuaranteeError(
                f"The plan protects units of {self.plan.unit!r}, and no units were given, so each row would count as "
                "a unit of its own: pass engine.accumulate the column that names them."
            )
        ids = None if units is None else unit_ids(units)
        if ids is not None and len(ids) != len(losses):
            raise GuaranteeError(
                f"{len(ids)} units were given for {len(losses)} losses: pass one unit for each example."
            )
        if not self._chance.is_kept:
            raise GuaranteeError(
                "Somebody seeded torch's generator during the step, and masks that follow from a known seed are no "
                "secret: remove that call of manual_seed or set_seed."
            )
        self._guard.check_parameters(new_step=self._total is None)
        return ids
