"""The proof before the first step: fast gradients against one example at a time, on real examples.

Three checks, all before any budget is spent (no number of the data leaves them but relative errors near 1e-6):

exact      per-example gradients of the whole batch, as the engine makes them, equal a loop of plain backward passes
isolated   an example's loss and gradient are the same alone and beside others, padding included, as far as the longest
covered    the forward pass leaves nothing of the examples in buffers and parameters, and every module that the engine
taps was at work

Chance is held still meanwhile, at values as large as it takes (:mod:`dpft.gradients.stand_ins`), and where a model
takes any the examples are compared twice, at different ones. The structure is proven in float32, whatever the run
computes in: rounding would hide a coupling that is as small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpft.errors import ExactnessError, GuaranteeError, IsolationError, first_line
from dpft.gradients.batch_gradients import row_norms
from dpft.gradients.capture import HALF, Capture
from dpft.gradients.capture_map import TrainableParameter
from dpft.gradients.determinism import NoRandomness, deterministic, in_precision
from dpft.gradients.engine import Engine
from dpft.gradients.precision import full_precision
from dpft.gradients.side_effects import leaves_no_data, without_side_effects
from dpft.gradients.stand_ins import DRAWS

TOLERANCE = 1e-4  # relative error that float32 arithmetic explains
HALF_TOLERANCE = 0.1  # and that of half precision, where a run uses it: only gross errors show
SHARES = (1.0, -2.0, 0.5, 2.0, -1.0, -0.5, 2.0, 1.0, -2.0, -0.5)  # of a sum, of one example after another
FLOOR = 1e-2  # a parameter's error is measured against at least this share of the whole gradient's norm


@dataclass(frozen=True)
class Preflight:
    """What the checks found. ``max_relative_error`` is the worst parameter's, over all examples tried."""

    exact: bool
    isolated: bool
    max_relative_error: float
    trainable_parameters: int
    techniques: dict[str, int]
    examples: int
    one_by_one: str | None = None

    def __str__(self) -> str:
        techniques = ", ".join(f"{count:,} by {name}" for name, count in self.techniques.items())
        return (
            f"preflight: exact (max relative error {self.max_relative_error:.1e}) and isolated on {self.examples} "
            f"examples; {self.trainable_parameters:,} trainable parameters ({techniques})"
        )


def preflight(
    engine: Engine,
    losses: Callable[[list], Tensor],
    examples: Sequence,
    precise_losses: Callable[[list], Tensor] | None = None,
    longest: object | None = None,
) -> Preflight:
    """Prove the engine's gradients on a few examples, or refuse.

    A parameter that its technique cannot serve, or serves wrongly, goes to the next (:meth:`Capture.lift`), at last to
    one backward pass per example; the engine keeps what was found.

    Args:
        engine: attached.
        losses: ``losses(examples) -> (B,)``, collation and task loss; called with one and with several examples.
        examples: at least two, preferably of different lengths.
        precise_losses: the same without autocast, if ``losses`` runs under it.
        longest: the longest example of all; the loss of the last of ``examples`` must be the same beside it, because
            a model may treat long batches in another way.

    Raises:
        ExactnessError: a parameter's fast gradient is not the brute-force one; named.
        IsolationError: examples influence each other; the layer is named where it can be found.
        GuaranteeError: the forward pass changes a buffer or a parameter, a loss is not finite, or no gradient reaches
            the subset.
    """
    examples = list(examples)
    if len(examples) < 2:
        raise GuaranteeError(
            f"The preflight was given {len(examples)} example, and isolation shows only beside others: give two or "
            "more."
        )
    capture, precise = engine.capture, precise_losses or losses
    with deterministic(capture), full_precision():
        with NoRandomness.of(capture, DRAWS[0]) as chance:
            half = [tensor for tensor in _floating(capture.model) if tensor.dtype in HALF]
            with in_precision(half, torch.float32):
                leaves_no_data(capture, precise, sorted(examples, key=_size))
            isolated, norms, references = _isolated(capture, precise, examples, longest)
            error = _exact(capture, losses, precise, examples, (isolated, norms, references))
        if chance.taken:  # what one set of stand-ins could hide by chance, two do not
            with NoRandomness.of(capture, DRAWS[1]):
                _isolated(capture, precise, examples, longest)
        capture.forms_known = True
    techniques: dict[str, int] = {}
    for trainable in capture.trainables:
        techniques[trainable.technique] = techniques.get(trainable.technique, 0) + trainable.parameter.numel()
    return Preflight(True, True, error, capture.size, techniques, len(examples), capture.one_by_one)


def _floating(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


def _isolated(capture: Capture, losses: Callable, examples: list, longest) -> tuple[float, Tensor, dict]:
    """What :func:`_isolation` finds in at least float32.

    Raises:
        IsolationError: it is more than rounding explains, or an example changes beside the longest.
    """
    floating = _floating(capture.model)
    half = [tensor for tensor in floating if tensor.dtype in HALF]
    beside_longest = lambda: _beside(capture, losses, examples[-1], longest)
    with in_precision(half, torch.float32):
        isolated, norms, references = _isolation(capture, losses, examples)
        beside = 0.0 if longest is None else beside_longest()
    # A coupling, or float32 rounding, which deep models amplify a thousandfold?
    isolated = _in_double(isolated, lambda: _isolation(capture, losses, examples)[0], floating)
    beside = _in_double(beside, beside_longest, floating)
    isolated = isolated if beside <= isolated else beside  # a NaN is an error
    if not isolated <= TOLERANCE:
        with in_precision(half, torch.float32), torch.no_grad():
            _refuse_other_chance(losses, examples)
            raise IsolationError(
                f"An example's gradient changes by {isolated:.1e} (relative) when others share its batch, so clipping "
                "it would not bound its influence: "
                f"{_coupling_layer(capture.model, losses, [*examples, *([] if longest is None else [longest])])}."
            )
    return isolated, norms, references


def _refuse_other_chance(losses: Callable, examples: list) -> None:
    """Raises IsolationError: the same examples give other losses the next time, though the global generators are held
    still."""
    changed = _relative(losses(examples), losses(examples))
    if not changed <= TOLERANCE:
        raise IsolationError(
            f"The same examples' loss changes by {changed:.1e} (relative) from pass to pass, so the collator or a "
            "layer has a generator of its own, or counts its calls: let it draw from the global generators."
        )


def _exact(capture: Capture, losses: Callable, precise: Callable, examples: list, isolation: tuple) -> float:
    """The largest relative error of the engine's gradients, in float32 and as far as half precision tells in what the
    run computes in."""
    isolated, norms, references = isolation
    half = [tensor for tensor in _floating(capture.model) if tensor.dtype in HALF]
    while True:
        with in_precision(half, torch.float32):
            error = max(isolated, _exactness(capture, precise, examples, norms, references, TOLERANCE))
        proven = capture.state()
        if half or precise is not losses:
            _exactness(capture, losses, examples, norms, {}, HALF_TOLERANCE)
        if capture.state() == proven:  # else half precision needed another arrangement, which is to be proven too
            return error


def _isolation(capture: Capture, losses: Callable, examples: list) -> tuple[float, Tensor, dict]:
    """How far an example's loss or gradient beside the others is from the one alone, by plain autograd.

    BatchGradients are compared in one random combination, in which each example has about the same weight: what a coupling
    changes in any of them changes it too.

    Returns:
        The largest relative error, ``(B,)`` norms of the gradients alone, and the combinations of two batches, the
        whole and the first example alone, by their examples' numbers.
    """
    with capture.paused():
        together = without_side_effects(capture.model, lambda: losses(examples))
        alone, gradients = [], []
        for example in examples:
            loss = losses([example])[0]
            alone.append(loss.detach())
            gradients.append(_gradient(capture, loss))
        alone, norms = torch.stack(alone), torch.stack([gradient.norm() for gradient in gradients])
        if not torch.isfinite(alone).all():
            raise GuaranteeError(
                "The loss of a preflight example is not finite: compute in float32, or look at its text and labels."
            )
        if not norms.any():
            raise GuaranteeError(
                "No trainable parameter gets a gradient from any preflight example: choose a subset that the loss "
                "depends on."
            )
        weights = _weights(norms)
        beside = _gradient(capture, together @ weights.to(together))
        expected = sum(weight * gradient for weight, gradient in zip(weights, gradients, strict=True))
    error = _relative(together.detach(), alone)
    error = max(error, _difference(capture, beside, expected)[1])
    return error, norms, {tuple(range(len(examples))): beside, (0,): _weights(norms[:1]) * gradients[0]}


def _weights(norms: Tensor) -> Tensor:
    """Coefficients that give gradients of these norms about the same share of their sum, always the same ones.

    They are ±½, ±1 or ±2 over the norm, under which no coupling has a reason to cancel, and powers of two, so that each
    example's part of a backward pass is rounded as it is by itself: deep models amplify rounding a thousandfold.
    """
    shares = torch.tensor([SHARES[i % len(SHARES)] for i in range(len(norms))])
    norms = norms.clamp_min(1e-3 * norms.max()).clamp_min(1e-30)
    return shares.to(norms) * 2.0 ** -norms.log2().round()


def _beside(capture: Capture, losses: Callable, example, longest) -> float:
    """How far an example's loss beside the longest of all is from the one alone; no more, or memory might not
    suffice."""
    with capture.paused(), torch.no_grad():
        try:
            together = without_side_effects(capture.model, lambda: losses([example, longest]))
        except torch.OutOfMemoryError as error:
            raise GuaranteeError(
                "The preflight looks at the longest example beside another, and two of its length do not fit into "
                "memory: cut the texts shorter (task.max_length)."
            ) from error
        return _relative(together[:1], losses([example]))


def _relative(losses: Tensor, expected: Tensor) -> float:
    return float(((losses - expected).abs() / expected.abs().clamp_min(1e-2)).max())


def _in_double(found: float, check: Callable[[], float], floating: list[Tensor]) -> float:
    """An error in float32, or, if it is too large, in float64, where the model and its inputs can be that."""
    if found <= TOLERANCE:
        return found
    try:
        with in_precision(floating, torch.float64):
            return check()
    except GuaranteeError:
        raise
    except Exception:  # whatever a device or a kernel says of a type that it does not know
        return found


def _exactness(
    capture: Capture, losses: Callable, examples: list, norms: Tensor, references: dict, tolerance: float
) -> float:
    """Compare the engine's rows with plain backward passes through the same batches; lift what fails until all agree.

    The batches have several sizes, which tell what is as long as the batch from the batch, both orders of lengths, and,
    as many a model then passes its mask in another form or not at all, no padding.

    Args:
        norms: ``(B,)``, of each example's gradient.
        references: what :func:`_isolation` found by plain backward passes; others are added.

    Returns:
        The largest relative error.
    """
    every = list(range(len(examples)))
    batches = [every, every[1::-1], [0, 0], [0]]
    capture.forms_known = False
    while True:
        failed, before, worst, error = None, capture.state(), capture.trainables[0], 0.0
        try:
            for batch in batches:
                chosen, weights = [examples[i] for i in batch], _weights(norms[batch])
                made, error_of_norms = _combined(capture, losses(chosen), weights)
                if tuple(batch) not in references:
                    with capture.paused():
                        plain = losses(chosen)
                        references[tuple(batch)] = _gradient(capture, plain @ weights.to(plain))
                trainable, wrong = _difference(capture, made, references[tuple(batch)])
                for found in (wrong, error_of_norms):
                    if not found <= error:  # a NaN error is an error
                        worst, error = trainable, found
        except Exception as problem:  # a model may raise anything when its layers are tapped or differentiated again
            if capture.one_by_one or (isinstance(problem, GuaranteeError) and not isinstance(problem, ExactnessError)):
                raise
            failed = problem
        finally:
            for trainable in capture.trainables:
                trainable.parameter.grad = None
        chancy = next((hooked for hooked in capture.hooked_modules if hooked.random), None)
        unseen = next((hooked for hooked in capture.hooked_modules if len(hooked.sizes) < 2), None)
        if chancy is not None:
            capture.go_one_by_one(f"{chancy.name} ({type(chancy.module).__name__}) draws random numbers")
        elif isinstance(failed, ExactnessError):
            capture.lift(failed.trainables, failed.reason)
        elif failed is not None:
            capture.go_one_by_one(f"the model cannot run while tapped ({first_line(failed)})")
        elif unseen is not None:
            name = f"{unseen.name} ({type(unseen.module).__name__})"
            capture.go_one_by_one(f"{name} was not reached by every preflight batch")
        elif capture.state() == before:  # else gradients were made before all was known of the calls: make them again
            if error <= tolerance:
                return error
            if capture.one_by_one:
                raise ExactnessError(
                    f"{worst.name} got a per-example gradient that differs from the brute-force one by {error:.1e} "
                    "(relative), more than rounding explains: leave it out of the subset and report the layer."
                )
            capture.lift([worst], f"{worst.name} came out wrong by {error:.1e} at {worst.technique}")


def _combined(capture: Capture, losses: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """The engine's rows of one batch in one combination ``(P,)``, and how far norms without rows are from theirs.

    Such a norm is rounded up, which only clips more: what it has too much counts a hundredth.
    """
    gradients = capture.gradients(losses)
    unmade, rows = gradients.norms(), gradients.rows(capture.size)
    lengths = row_norms(rows)
    excess = (unmade - lengths) / lengths.clamp_min(1e-30)
    return weights @ rows, float(torch.where(excess > 0, excess / 100, -excess).max()) if lengths.any() else 0.0


def _gradient(capture: Capture, loss: Tensor) -> Tensor:
    """``(P,)``: one plain backward pass, through a graph that others may share; to be called while paused."""
    for trainable in capture.trainables:
        trainable.parameter.grad = None
    if loss.requires_grad:
        loss.backward(retain_graph=True)
    flat = torch.zeros(capture.size, dtype=torch.float32, device=loss.device)
    capture.collect_grads(flat)
    return flat


def _difference(capture: Capture, made: Tensor, expected: Tensor) -> tuple[TrainableParameter, float]:
    """The trainable with the largest relative error of a ``(P,)`` gradient, and that error."""
    worst, largest = capture.trainables[0], 0.0
    floor = FLOOR * expected.norm()
    for trainable in capture.trainables:
        wanted = expected[trainable.slice]
        error = float((made[trainable.slice] - wanted).norm() / torch.maximum(wanted.norm(), floor).clamp_min(1e-30))
        if not error <= largest:  # a NaN error is an error
            worst, largest = trainable, error
    return worst, largest


def _coupling_layer(model: nn.Module, losses: Callable, examples: list) -> str:
    """Name the first layer whose output for the longest example depends on which others are in the batch."""
    outputs: list[list[tuple[str, Tensor]]] = []
    longest = max(range(len(examples)), key=lambda i: _size(examples[i]))
    others = [example for i, example in enumerate(examples) if i != longest]
    for companion in (others[0], others[-1] if len(others) > 1 else examples[longest]):
        seen: list[tuple[str, Tensor]] = []
        hooks = [
            module.register_forward_hook(
                lambda m, a, out, name=name, seen=seen: seen.append((f"{name} ({_class(m)})", out))
            )
            for name, module in model.named_modules()
        ]
        try:
            losses([examples[longest], companion])
        finally:
            for hook in hooks:
                hook.remove()
        outputs.append(seen)
    for (name, one), (_, two) in zip(*outputs, strict=False):
        if isinstance(one, Tensor) and one.shape == two.shape and one.dim() and len(one) == 2:
            if one.is_floating_point() and not torch.allclose(one[0], two[0], rtol=1e-3, atol=1e-5):
                return f"layer {name} mixes the examples of a batch; freeze it and put it in eval mode, or replace it (BatchNorm by GroupNorm)"
    return "padding or the loss couples them; pass an attention mask, and return each example's own loss, normalised by itself"


def _class(module: nn.Module) -> str:
    """PyTorch's classes by their name, others with their module, since many a tuner's layer is called Linear."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__name__}"


def _size(example) -> int:
    if not isinstance(example, dict):
        return 0
    several = [value for value in example.values() if hasattr(value, "__len__") and getattr(value, "shape", None) != ()]
    return max(map(len, several), default=0)
