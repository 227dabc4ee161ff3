"""On a GPU everything is what it is on the processor; skipped where there is none."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from dpft.gradients import precision
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.gradients.rules.linear import Product
from dpft.privacy import noise
from dpft.privacy.chacha import DeviceStream
from dpft.privacy.clipping import FlatClip
from dpft.privacy.noise import SecureRandomness, SeededRandomness
from dpft.subset import Subset
from dpft.tasks import LabelledTask, cross_entropy
from dpft.tasks.losses import token_losses
from dpft.training.trainer import DPTrainer
from tests.support.zoo import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = torch.device("cuda")
C = 0.05


def on_gpu(family, subset, dtype=torch.float32):
    """The case and its losses, collated and then moved, as a trainer does."""
    case = Case(family)
    case.model = Subset(subset).apply(case.model).to(CUDA, dtype)
    for name, parameter in case.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = case.batch
    case.batch = lambda examples: {key: value.to(CUDA) for key, value in batch(examples).items()}
    return case


def clipped_sum(case, plan, examples=None):
    with Engine(case.model, plan) as engine:
        engine.accumulate(case.losses(examples or case.examples))
        engine.release()
    return torch.cat([p.grad.flatten().float().cpu() for p in case.model.parameters() if p.requires_grad])


def test_the_stream_is_the_ciphers():
    """T10: bit for bit that of OpenSSL, from one part to the next."""
    key, nonce = bytes(range(100, 132)), bytes(range(240, 252))
    device, processor = DeviceStream(key, nonce, CUDA), noise._Stream(key, nonce)
    for size in (8, 24, 1 << 20):
        found = torch.empty(2, 2, size // 4, dtype=torch.float64, device=CUDA)
        expected = torch.empty(size, dtype=torch.float64)
        device.fill(found)
        processor.fill(expected)
        assert torch.equal(found.view(-1).cpu(), expected)


def test_noise_is_the_same_draw_but_for_rounding(monkeypatch):
    monkeypatch.setattr(noise, "_CHUNK", 1 << 10)
    monkeypatch.setattr(noise, "_DEVICE_CHUNK", 1 << 10)
    expected = SeededRandomness(5).gaussian(10_000)
    found = torch.cat([part.cpu() for part in SeededRandomness(5).gaussians(10_000, CUDA)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    parts = [part.clone() for part in SecureRandomness().gaussians(3_000_001, CUDA)]
    values = torch.cat(parts)
    assert len(values) == 3_000_001 == len(values.unique())
    error = (values.square().mean() - 1) * (len(values) / 2) ** 0.5  # in its standard errors
    assert abs(error) < 5 < abs(((2 / 3 * values).square().mean() - 1) * (len(values) / 2) ** 0.5)


@pytest.mark.parametrize(
    "subset", ["lora(targets='all-linear')", "norms", "all", "sparse(fraction=0.2)", "ia3", "bias"]
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "qwen2_moe"])
def test_gradients_are_proven_and_sum_to_those_of_the_processor(family, subset, plan):
    if subset == "bias" and family in ("llama", "t5"):
        pytest.skip("there is no bias")
    quiet = plan(noise_multiplier=0.0, sample_rate=0.125, clip=FlatClip(C), steps=4)
    sums = []
    for device in (CUDA, torch.device("cpu")):
        case = on_gpu(family, subset)
        torch.manual_seed(2)
        for name, parameter in case.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape))
        if device.type == "cpu":
            case.model.cpu()
            case.batch = Case.batch.__get__(case)
        case.model.eval()
        with Engine(case.model, quiet) as engine:
            found = preflight(engine, case.losses, case.examples)
            assert found.exact and found.isolated
            for i in range(len(case.examples)) if found.one_by_one else [slice(None)]:
                engine.accumulate(case.losses(case.examples[i] if isinstance(i, slice) else [case.examples[i]]))
            engine.release()
        sums.append(torch.cat([p.grad.flatten().cpu() for p in case.model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("subset", ["lora", "norms", "all"])
def test_half_precision_is_proven_and_close(subset, plan):
    quiet = plan(noise_multiplier=0.0, sample_rate=0.125, clip=FlatClip(C))
    sums = []
    for dtype in (torch.float32, torch.bfloat16):
        case = on_gpu("llama", subset, dtype)
        case.model.eval()
        with Engine(case.model, quiet) as engine:
            assert preflight(engine, case.losses, case.examples).exact
        torch.manual_seed(2)
        for name, parameter in case.model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape))
        sums.append(clipped_sum(case, quiet))
    assert (sums[0] - sums[1]).norm() < 0.1 * sums[0].norm()
    assert sums[1].norm() <= 3 * C * 1.01


def test_tf32_does_not_reach_norms_and_sums(plan):
    """T6: with TF32 allowed, products of matrices are rounded to 11 bits, but not these."""
    torch.manual_seed(0)
    product = Product(torch.randn(4, 300, 512, device=CUDA), torch.randn(4, 300, 256, device=CUDA))
    truth = torch.bmm(product.left.double().mT, product.right.double())
    norms = truth.flatten(1).norm(dim=1)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = torch.bmm(product.left.mT, product.right)
        assert (rounded - truth).norm() > 1e-4 * truth.norm()  # the test could fail
        torch.testing.assert_close(product.squared_norms().sqrt().double(), norms, rtol=2e-4, atol=0)
        assert (product.squared_norms().sqrt() >= norms * (1 - 1e-6)).all()
        total = torch.zeros(512, 256, device=CUDA)
        product.add_to(total, 1 / norms.float())
        torch.testing.assert_close(total.double(), (truth / norms.view(-1, 1, 1)).sum(0), rtol=1e-4, atol=1e-5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_of_half_precision_are_not_rounded_to_it():
    torch.manual_seed(0)
    a, b = (torch.randn(4, 64, 64, device=CUDA).bfloat16() for _ in range(2))
    found, truth = precision.precise_bmm(a, b), torch.bmm(a.double(), b.double())
    assert found.dtype == torch.float32 and (found - truth).norm() < 1e-5 * truth.norm()


def test_token_losses_are_those_of_the_processor():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 50, 5000), torch.randint(5000, (3, 50))
    labels[0, :20] = labels[2, 30:] = -100
    found = []
    for device in (CUDA, torch.device("cpu")):
        leaf = logits.to(device).requires_grad_()
        losses = token_losses(leaf, labels.to(device), shift=True)
        losses.sum().backward()
        found.append((losses.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_a_frozen_head_are_those_of_its_logits(dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "DEVICE_PIECE", 1 << 17)
    head = nn.Linear(64, 5000, bias=False, device=CUDA, dtype=dtype).requires_grad_(False)
    states, labels = torch.randn(3, 50, 64, device=CUDA, dtype=dtype), torch.randint(5000, (3, 50), device=CUDA)
    labels[0, :20] = labels[2, 30:] = -100
    found = []
    for own in (head, None):
        leaf = states.clone().requires_grad_()
        losses = token_losses(leaf if own else head(leaf), labels, shift=True, head=own)
        losses.sum().backward()
        found.append((losses.detach(), leaf.grad))
    torch.testing.assert_close(*found, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}))


@pytest.mark.parametrize("subset", ["lora", "all"])
def test_a_non_finite_unit_contributes_nothing(subset, plan):
    """T12: without waiting for the GPU where gradients are small."""
    case = on_gpu("bert", subset)
    case.model.eval()
    quiet = plan(noise_multiplier=0.0, sample_rate=0.125, clip=FlatClip(C))
    wanted = clipped_sum(case, quiet, case.examples[:2])
    case.model.zero_grad()
    with Engine(case.model, quiet) as engine:
        engine.accumulate(case.losses(case.examples) * torch.tensor([1.0, 1.0, torch.inf], device=CUDA))
        engine.release()
        assert engine.nonfinite_units == 1
    found = torch.cat([p.grad.flatten().cpu() for p in case.model.parameters() if p.requires_grad])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_a_micro_batch_can_be_captured_as_a_graph(plan):
    """CUDA graphs are not prevented: nothing of an adapter's micro-batch waits for the GPU."""
    case = on_gpu("llama", "lora")
    case.model.eval()
    batch = {k: v for k, v in case.batch([case.examples[1]] * 2).items() if k == "input_ids"}
    losses = lambda: case.model(**batch, use_cache=False).logits.float().square().mean((1, 2))
    with Engine(case.model, plan(noise_multiplier=0.0, clip=FlatClip(C))) as engine:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                engine.accumulate(losses())
        torch.cuda.current_stream().wait_stream(side)
        once = engine._sum().clone() / 3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            engine.accumulate(losses())
        graph.replay()
        graph.replay()
        torch.testing.assert_close(engine._sum(), 5 * once, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"tf32": True}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("subset", ["lora + head", "last_blocks(1)", "all"])
def test_a_trainer_trains(subset, settings, plan, tmp_path):
    case = Case("bert")
    args = TrainingArguments(
        str(tmp_path), report_to=[], disable_tqdm=True, learning_rate=0.01, save_strategy="no", **settings
    )
    model = Subset(subset).apply(case.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = DPTrainer(
        model=model,
        args=args,
        train_dataset=case.examples * 10,
        eval_dataset=case.examples,
        plan=plan(units=30, steps=6),
        task=LabelledTask(case.batch),
    )
    try:
        trainer.train()
    finally:
        torch.backends.fp32_precision = "none"
    assert trainer.session.engine.steps_released == 6 and trainer.guarantee == trainer.session.plan.guarantee(6)
    after = dict(trainer.model.named_parameters())
    assert all(p.is_cuda for p in after.values())
    assert all((after[name].cpu() != value).any() for name, value in before.items())
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_correlated_noise_on_a_device_is_that_of_the_inverse_matrix(monkeypatch):
    monkeypatch.setattr(noise, "_DEVICE_CHUNK", 1 << 10)  # so that a row has several parts
    size, column = 3000, (0.8, 0.5, 0.33)
    fresh = noise.FreshNoise(size, SeededRandomness(1), CUDA)
    banded = noise.BandedNoise(size, SeededRandomness(1), CUDA, column)
    z, y = (
        torch.stack([torch.cat([part.clone() for part in stream.following()]) for _ in range(6)])
        for stream in (fresh, banded)
    )
    again = sum(weight * torch.cat([torch.zeros_like(y[:back]), y[: 6 - back]]) for back, weight in enumerate(column))
    assert y.is_cuda and torch.allclose(again, z, rtol=0, atol=1e-12)
