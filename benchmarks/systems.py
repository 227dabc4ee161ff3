"""What benchmarks/speed.py times: plain training, dpft and its peers at one micro-batch and one update.

Every system has ``micro_batch()`` (forward, backward, clipping), ``update()`` (noise, AdamW) and ``clipped_sum()``.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CLIP = 0.01  # less than any gradient here: a wrong norm shows in the sum
EFFECTIVE = 256  # examples in a step
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Work:
    """A model, what trains, and a micro-batch of ``examples`` sequences of ``tokens``."""

    model: str
    subset: str
    tokens: int
    examples: int
    layers: int = 12  # of GPT-2
    device: str = "cpu"
    dtype: str = "float32"  # with bfloat16 the frozen weights are that, and the forward pass is under autocast

    @property
    def micro_batches(self) -> float:
        """In a step."""
        return EFFECTIVE / self.examples


LLAMA = {
    "llama-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "llama-7b": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    ),
}  # fmt: skip


def made(work: Work):
    """The model with its subset, one batch, and ``losses(model, batch) -> (B,)``."""
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    import dpft
    from dpft.tasks.losses import class_losses

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if work.model == "minilm":
        path = os.path.join(os.environ["DPFT_MODELS"], "minilm-l6")
        none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=22, **none)
    elif work.model in LLAMA:  # of random weights, which are as fast as any
        config = transformers.LlamaConfig(**LLAMA[work.model], use_cache=False)
        with torch.device(work.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, work.dtype))
    else:
        none = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=work.layers, **none))
        with_linear(model)
    model = dpft.Subset(work.subset).apply(model).to(work.device)
    with torch.no_grad():  # a fresh LoRA's B is zero, and so would be half of the gradients that are compared
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    ids = torch.randint(1000, 20000, (work.examples, work.tokens), generator=generator).to(work.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if work.model == "minilm":
        batch["labels"] = torch.randint(22, (work.examples,), generator=generator).to(work.device)
        losses = lambda model, batch: class_losses(forward(model, batch), batch["labels"])
    else:
        batch["labels"] = ids
        half = work.dtype == "bfloat16"

        def losses(model, batch):
            with torch.autocast(work.device, torch.bfloat16) if half else nullcontext():
                logits = forward(model, batch)[:, :-1]
            labels = batch["labels"][:, 1:]  # nothing is padded
            each = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
            return each.view(labels.shape).mean(1)

    return model.train(), batch, losses


def with_linear(model) -> None:
    """GPT-2's Conv1D layers as nn.Linear, of the same values, so that every system has its rule for them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)


def forward(model, batch):
    from dpft.tasks.losses import without_labels

    return model(**without_labels(batch)).logits


def cut(batch: dict, size: int) -> list[dict]:
    examples = len(batch["labels"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, examples, size)]


def trainable(model) -> dict:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class System:
    def close(self) -> None:
        """Let go of the model."""


class Plain(System):
    def __init__(self, work: Work) -> None:
        import torch

        self.model, self.batch, self.losses = made(work)
        self.optimizer = torch.optim.AdamW(trainable(self.model).values(), lr=LEARNING_RATE)

    def micro_batch(self) -> None:
        (self.losses(self.model, self.batch).sum() / EFFECTIVE).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clipped_sum(self) -> dict:
        """By brute force, example by example."""
        import torch

        parameters = trainable(self.model)
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for part in cut(self.batch, 1):
            gradients = torch.autograd.grad(self.losses(self.model, part)[0], list(parameters.values()))
            norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()  # float32 would lose 5e-5
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name].add_(gradient, alpha=float((CLIP / norm).clamp(max=1.0)))
        return total


def losses_of_a_run(work: Work, losses: Callable) -> Callable:
    """Those of dpft's task, where plain training's are ``losses``: of a language model, whose logits it never makes at
    once."""
    import torch

    from dpft.tasks import LabelledTask

    if work.model == "minilm":
        return losses
    task = LabelledTask(collator=None)  # the batch is made
    if work.dtype != "bfloat16":
        return task.losses

    def under_autocast(model, batch):
        with torch.autocast(work.device, torch.bfloat16):
            return task.losses(model, batch)

    return under_autocast


class OfDPFT(System):
    def __init__(self, work: Work) -> None:
        import torch

        import dpft
        from dpft.gradients.engine import Engine
        from dpft.training.heap import keep_freed_memory
        from dpft.training.tuning import free_memory, workspace

        self.work = work
        self.model, self.batch, self.plain_losses = made(work)
        self.losses = losses_of_a_run(work, self.plain_losses)
        self.optimizer = torch.optim.AdamW(trainable(self.model).values(), lr=LEARNING_RATE)
        plan = dpft.Plan(
            noise_multiplier=1.0,
            sample_rate=EFFECTIVE / 1e6,
            steps=10**6,
            delta=1e-7,
            units=10**6,
            clip=dpft.FlatClip(CLIP),
        )
        self.engine = Engine(self.model, plan)
        device = torch.device(work.device)
        self.engine.workspace_bytes = workspace(device, free_memory(device))
        self.attached = ExitStack()  # as a run does
        self.attached.enter_context(keep_freed_memory())
        self.attached.enter_context(self.engine)

    def micro_batch(self) -> None:
        for part in cut(self.batch, self.engine.max_examples(self.work.tokens)):
            self.engine.accumulate(self.losses(self.model, part))

    def update(self) -> None:
        self.engine.release()
        self.optimizer.step()

    def clipped_sum(self) -> dict:
        self.micro_batch()
        total = self.engine._sum()
        found = {p.name: p.view(total).clone() for p in self.engine.capture.map.trainables}
        self.engine.discard()
        return found

    def close(self) -> None:
        self.attached.close()  # as long as the engine watches the optimizers, PyTorch keeps it


class OfAuto(OfDPFT):
    """With the micro-batch that a run chooses for itself (``token_budget="auto"``), no larger than plain's."""

    def __init__(self, work: Work) -> None:
        from dpft.training.tuning import Room, fastest_budget, free_memory

        super().__init__(work)
        first = lambda n: {name: values[:n] for name, values in self.batch.items()}
        budget = fastest_budget(
            lambda n: self.losses(self.model, first(n)),
            lambda losses: (self.engine.accumulate(losses), self.engine.discard()),
            self.model,
            Room(
                tokens=work.tokens,
                most=min(work.examples, self.engine.max_examples(work.tokens)),
                memory=free_memory(next(self.model.parameters()).device),
            ),
        )
        self.size = max(1, budget.tokens // work.tokens)

    def micro_batch(self) -> None:
        for part in cut(self.batch, self.size):
            self.engine.accumulate(self.losses(self.model, part))


class OfVariant(OfDPFT):
    """With another choice between making the gradient of a large weight and taking its norm alone."""

    def __init__(self, work: Work, operations_per_number: float) -> None:
        from dpft.gradients.rules import linear

        linear.OPERATIONS_PER_NUMBER = operations_per_number
        super().__init__(work)


class OfBF16(OfDPFT):
    def __init__(self, work: Work) -> None:
        import torch

        super().__init__(work)
        precise = self.losses

        def losses(model, batch):
            with torch.autocast(work.device, torch.bfloat16):
                return precise(model, batch)

        self.losses = losses


class HeapKept(Plain):
    """With the setting of the C library that a private run trains under, which needs no privacy."""

    def __init__(self, work: Work) -> None:
        from dpft.training.heap import keep_freed_memory

        super().__init__(work)
        self.kept = ExitStack()
        self.kept.enter_context(keep_freed_memory())

    def close(self) -> None:
        self.kept.close()


class FewLogits(Plain):
    """With the losses of a private run, which need no privacy."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.losses = losses_of_a_run(work, self.losses)


class AllLogits(OfDPFT):
    """With plain training's losses."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.losses = self.plain_losses


class Compiled(Plain):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.model.compile()


class OfOpacus(System):
    def __init__(self, work: Work, **settings) -> None:
        import torch

        wrapper, optimizer = self.classes()
        model, self.batch, self.losses = made(work)
        self.model = wrapper(model, loss_reduction="sum", **settings)
        self.optimizer = optimizer(
            torch.optim.AdamW(trainable(model).values(), lr=LEARNING_RATE),
            noise_multiplier=1.0,
            max_grad_norm=CLIP,
            expected_batch_size=EFFECTIVE,
            loss_reduction="sum",
        )

    def classes(self) -> tuple[type, type]:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        return GradSampleModule, DPOptimizer

    def backward(self) -> None:
        self.losses(self.model, self.batch).sum().backward()

    def micro_batch(self) -> None:
        self.backward()
        self.optimizer.signal_skip_step(True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update(self) -> None:
        self.optimizer.add_noise()
        self.optimizer.original_optimizer.step()
        self.forget()

    def forget(self) -> None:
        for parameter in self.optimizer.params:
            parameter.summed_grad = parameter.grad = None

    def clipped_sum(self) -> dict:
        self.micro_batch()
        found = {n.removeprefix("_module."): p.summed_grad.clone() for n, p in trainable(self.model).items()}
        self.forget()
        return found


class OfGhost(OfOpacus):
    def classes(self) -> tuple[type, type]:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
        from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping

        return GradSampleModuleFastGradientClipping, DPOptimizerFastGradientClipping

    def backward(self) -> None:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        losses = self.losses(self.model, self.batch)
        DPTensorFastGradientClipping(self.model, self.optimizer, losses, loss_reduction="sum").backward()


class OfOpake(System):
    def __init__(self, work: Work) -> None:
        import torch
        from opake.dpsgd.clipping import clipped_grad
        from opake.dpsgd.noise import gaussian_noise
        from opake.patches import apply_model_patches, apply_runtime_patches
        from opake.random import key

        apply_runtime_patches()
        self.model, self.batch, losses = made(work)
        apply_model_patches(self.model)
        self.parameters = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE)
        names = list(self.batch)

        def loss(parameters, *values):
            part = {name: value.unsqueeze(0) for name, value in zip(names, values, strict=True)}
            model = lambda **inputs: torch.func.functional_call(self.model, parameters, (), inputs)
            return losses(model, part)[0]

        self.gradient, self.clip_state = clipped_grad(
            loss, clipping_norm=CLIP, batch_argnums=tuple(range(1, 1 + len(names))), normalize_by=1.0
        )
        self.noise, self.noise_state = gaussian_noise(noise_multiplier=1.0, key=key(42))

    def micro_batch(self) -> None:
        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        found, self.clip_state = self.gradient(parameters, *self.batch.values(), state=self.clip_state)
        self.total = found  # the same object for every micro-batch: opake's own loop adds them up outside

    def update(self) -> None:
        noisy, self.noise_state = self.noise(self.total, self.noise_state)
        for name, parameter in self.parameters.items():
            parameter.grad = noisy.pytree[name] / EFFECTIVE
        self.optimizer.step()

    def clipped_sum(self) -> dict:
        self.micro_batch()
        return {name: gradient.clone() for name, gradient in self.total.pytree.items()}


SYSTEMS: dict[str, Callable] = {
    "plain": Plain,
    "dpft": OfDPFT,
    "dpft auto": OfAuto,
    "opacus hooks": OfOpacus,
    "opacus ghost": partial(OfGhost, max_grad_norm=CLIP, use_ghost_clipping=True),
    "opacus functorch": partial(OfOpacus, force_functorch=True),
    "opake": OfOpake,
}
VARIANTS: dict[str, Callable] = {
    "dpft, all made": partial(OfVariant, operations_per_number=0),
    "dpft, none made": partial(OfVariant, operations_per_number=1e12),
    "dpft, all logits": AllLogits,
    "dpft, bf16": OfBF16,
    "plain, heap kept": HeapKept,
    "plain, few logits": FewLogits,
    "plain, compiled": Compiled,
}
