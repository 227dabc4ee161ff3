"""The loss without all logits is the loss with them, whatever a model does to its logits."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpft.tasks import LabelledTask, head
from dpft.tasks import cross_entropy as module
from dpft.tasks.cross_entropy import head_cross_entropies
from dpft.tasks.head import before_head
from dpft.tasks.losses import IGNORED, token_losses

WORDS = 60
SIZES = dict(vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, pad_token_id=0)


@pytest.fixture(params=[(7, 11), (40, 100), (1 << 19, 1 << 24)])
def pieces(request, monkeypatch):
    monkeypatch.setattr(module, "PIECE", request.param[0])
    monkeypatch.setattr(module, "MADE", request.param[1])


def some(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    labels = torch.randint(11, (30,))
    labels[torch.tensor([0, 1, 2, 9, 17, 18, 29])] = IGNORED
    layer = nn.Linear(5, 11, bias=bias, dtype=dtype).requires_grad_(False)
    return torch.randn(30, 5, dtype=dtype) * 3, layer, labels, torch.randn(30)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_and_gradients_are_those_of_pytorch(pieces, dtype, bias):
    states, layer, labels, weights = some(dtype, bias)
    found = []
    for function in (
        lambda x: head_cross_entropies(x, layer, labels, IGNORED),
        lambda x: cross_entropy(layer(x).to(torch.promote_types(dtype, torch.float32)), labels, reduction="none"),
    ):
        leaf = states.clone().requires_grad_()
        losses = function(leaf)
        (losses * weights).sum().backward()
        found.append((losses.detach(), leaf.grad))
    assert found[0][0].dtype == found[1][0].dtype and found[0][1].dtype == dtype
    half = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*found, **half)


def test_a_loss_has_its_own_gradient_alone(pieces):
    """T2: where each example has a backward pass of its own, nothing of its neighbours is in it."""
    states, layer, labels, _ = some()
    losses = head_cross_entropies(states.requires_grad_(), layer, labels, IGNORED)
    for i in (3, 10, 28):
        (gradient,) = torch.autograd.grad(losses[i], states, retain_graph=True)
        assert gradient[i].any() and not gradient[torch.arange(30) != i].any()


def test_states_without_a_label_may_be_anything(pieces):
    """T2, T12."""
    states, layer, labels, _ = some()
    clean = head_cross_entropies(states, layer, labels, IGNORED)
    states[labels == IGNORED] = torch.nan
    leaf = states.requires_grad_()
    losses = head_cross_entropies(leaf, layer, labels, IGNORED)
    losses.sum().backward()
    assert torch.equal(losses, clean)
    assert (leaf.grad[labels == IGNORED] == 0).all() and torch.isfinite(leaf.grad).all()


def test_nothing_labelled_is_no_loss_and_no_gradient():
    states, layer, labels, _ = some()
    losses = head_cross_entropies(states.requires_grad_(), layer, torch.full_like(labels, IGNORED), IGNORED)
    losses.sum().backward()
    assert not losses.any() and not states.grad.any()


def test_large_logits_do_not_overflow(pieces):
    layer = nn.Linear(3, 3, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.eye(3))
    states, labels = torch.tensor([[1e4, 0.0, -1e4], [88.0, 89.0, 90.0]], requires_grad=True), torch.tensor([2, 2])
    losses = head_cross_entropies(states, layer, labels, IGNORED)
    losses.sum().backward()
    torch.testing.assert_close(losses, cross_entropy(states, labels, reduction="none"))
    assert torch.isfinite(states.grad).all()


def test_a_second_derivative_is_refused():
    states, layer, labels, _ = some()
    losses = head_cross_entropies(states.requires_grad_(), layer, labels, IGNORED)
    (first,) = torch.autograd.grad(losses.sum(), states, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_under_autocast_the_head_computes_in_half_precision():
    states, layer, labels, _ = some()
    with torch.autocast("cpu", torch.bfloat16):
        found = head_cross_entropies(states, layer, labels, IGNORED)
        expected = cross_entropy(layer(states).float(), labels, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


# -- models ------------------------------------------------------------------------------------------------------------


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))


def capped():
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8)
    )


def scaled():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.3, eos_token_id=1))


def masked():
    """It writes into what its head gave."""
    model = llama()

    class Masked(type(model)):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits[:, :, torch.tensor([3, 4])] = -9.0
            return output

    model.__class__ = Masked
    return model


def multiplied():
    model = llama()

    class Multiplied(type(model)):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits.mul_(0.5)
            return output

    model.__class__ = Multiplied
    return model


def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, WORDS, (3, 9))
    labels = ids.clone()
    labels[0, 4:] = labels[1, :3] = IGNORED
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def found_and_expected(model, given):
    """Losses and the embedding's gradient, by the task and from the model's own logits."""
    weight = model.get_input_embeddings().weight
    inputs = {name: value for name, value in given.items() if name != "labels"}
    for losses in (
        LabelledTask(None).losses(model, given),
        token_losses(model(**inputs).logits, given["labels"], shift=True),
    ):
        yield losses.detach(), torch.autograd.grad((losses * torch.arange(1.0, 4.0)).sum(), weight)[0]


def trained_below(model):
    """Everything but the head trains."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    return model.train()


@pytest.mark.parametrize("make", [llama, capped, scaled, masked, multiplied])
@pytest.mark.filterwarnings("ignore:Use of index_put_ on expanded tensors")
def test_a_models_losses_are_those_of_its_logits(make):
    model = trained_below(make())
    for _ in range(2):  # a model that was seen to change its logits is remembered
        torch.testing.assert_close(*found_and_expected(model, batch()))
    assert (before_head(model, {"input_ids": batch()["input_ids"]})[1] is not None) == (make is llama)
    assert (model in head._CHANGED) == (make is not llama)


def test_no_tensor_is_as_large_as_the_logits(monkeypatch):
    """And the head sees labelled tokens alone."""
    monkeypatch.setattr(module, "MADE", 4 * WORDS)
    sizes, products = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            if func.overloadpacket is torch.ops.aten.mm and WORDS in out.shape:
                products.append(len(out))
            return out

    model, given = trained_below(llama()), batch()
    labelled = int((given["labels"][:, 1:] != IGNORED).sum())
    given["labels"] = given["labels"].expand(4, -1, -1).flatten(0, 1)
    given = {name: value if name == "labels" else value.repeat(4, 1) for name, value in given.items()}
    with Watch():
        LabelledTask(None).losses(model, given).sum().backward()
    assert max(sizes) < 12 * 9 * WORDS * 4
    assert sum(products) == 4 * labelled and max(products) == 4


def test_a_head_that_trains_or_is_watched_makes_its_logits(case):
    tuned = case("llama", tuner="lora").model
    inputs = {"input_ids": batch()["input_ids"]}
    assert before_head(tuned, inputs)[1] is tuned.get_output_embeddings()

    whole = llama()  # its head is its embedding, which trains
    assert before_head(whole, inputs)[1] is None

    seen = []
    watched = case("llama", tuner="lora").model
    handle = watched.get_output_embeddings().register_forward_hook(lambda m, a, output: seen.append(output))
    assert before_head(watched, inputs)[1] is None and len(seen) == 1
    handle.remove()
    assert before_head(watched, inputs)[1] is not None

    moved = case("llama", tuner="lora").model  # as accelerate does, to bring a layer's weights when they are needed
    layer = moved.get_output_embeddings()
    own = layer.forward
    layer.forward = lambda states: own(states) + 1
    assert before_head(moved, inputs)[1] is None and "forward" in vars(layer)


def test_a_failing_model_is_left_as_it_was():
    model = trained_below(llama())
    state = copy.copy(vars(model.lm_head))
    with pytest.raises(IndexError):
        before_head(model, {"input_ids": torch.tensor([[WORDS + 1]])})
    assert vars(model.lm_head) == state
    torch.testing.assert_close(*found_and_expected(model, batch()))


@pytest.mark.parametrize(("error", "tries"), [(torch.OutOfMemoryError, 1), (RuntimeError, 2)])
def test_a_failure_says_nothing_of_the_logits(error, tries):
    """And what does not fit into memory is not tried twice."""
    model, passes = trained_below(llama()), []
    own = model.model.forward

    def forward(*_, **__):
        passes.append(1)
        raise error("it failed")

    model.model.forward = forward
    with pytest.raises(error):
        before_head(model, {"input_ids": batch()["input_ids"]})
    model.model.forward = own
    assert len(passes) == tries
    assert before_head(model, {"input_ids": batch()["input_ids"]})[1] is model.lm_head


def test_virtual_tokens_before_the_text_have_no_loss(case):
    tuned = case("llama", tuner="prompt tuning")
    labels = (given := tuned.batch(tuned.examples))["labels"]
    inputs = {name: value for name, value in given.items() if name != "labels"}
    states, layer = before_head(tuned.model, inputs)
    assert layer is not None and states.shape[1] > labels.shape[1]
    torch.testing.assert_close(token_losses(states, labels, shift=True, head=layer), tuned.losses(tuned.examples))
