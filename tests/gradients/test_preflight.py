"""Exact on every family and subset, or refused by name."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from dpft.errors import ExactnessError, GuaranteeError, IsolationError
from dpft.gradients import capture
from dpft.gradients.capture import Capture
from dpft.gradients.engine import Engine
from dpft.gradients.findings import Findings
from dpft.gradients.preflight import preflight
from dpft.gradients.preflight.comparison import worst_parameter
from dpft.gradients.preflight.fingerprint import fingerprint
from dpft.privacy.clipping import FlatClip
from dpft.subset import Subset
from dpft.tasks.losses import class_losses, pad_features, token_losses

SUBSETS = [
    "lora",
    "lora(targets='all-linear') + head",
    "lora(last_blocks=1) + norms",
    "lora(dora=True) + sparse(fraction=0.1)",
    "sparse(fraction=0.01, over='model', choose='random') + norms",
    "sparse(rank=1)",
    "head",
    "bias",
    "norms",
    "last_blocks(1)",
    "layers('*1*')",
    "all",
    "head + norms",
]
FAMILIES = ["bert", "gpt2", "llama", "vit", "dinov2"]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_subset_is_exact_on_every_family(family, subset, case, plan):
    if (family, subset) == ("llama", "bias"):
        pytest.skip("Llama has no bias")
    made = case(family)
    made.model = Subset(subset).apply(made.model)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with Engine(made.model, plan()) as engine:
        found = preflight(engine, made.losses, made.examples)
    assert found.exact and found.isolated and found.max_relative_error < 1e-5
    assert found.trainable_parameters == sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())
    assert all(p.grad is None for p in made.model.parameters())


def test_position_embeddings_are_captured_at_the_module_around_them(case, plan):
    """T3: their input is (1, T) however large the batch, but that of all embeddings together is (B, T)."""
    made = case("bert")
    made.model.bert.embeddings.dropout.p = 0.0  # a second forward could not repeat its mask
    made.model = Subset("layers('*position_embeddings*')").apply(made.model)
    with Engine(made.model, plan()) as engine:
        with pytest.raises(ExactnessError, match=r"position_embeddings.weight .* 1 gradients for a batch of 3"):
            engine.accumulate(made.losses(made.examples))
        engine.discard()
        assert preflight(engine, made.losses, made.examples).techniques == {"functional": 512}
        assert [type(hooked.module).__name__ for hooked in engine.capture.map.hooked_modules] == ["BertEmbeddings"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_that_are_made_once_for_the_batch_go_one_by_one(family, case, plan):
    """T3: the prompt encoder has no batch dimension, and no module around it is called with one."""
    made = case(family)
    made.model = Subset("prompt_tuning(num_virtual_tokens=3)").apply(made.model)
    with Engine(made.model, plan()) as engine:
        found = preflight(engine, made.losses, made.examples)
        assert found.techniques == {"per example": 48} and "prompt_encoder" in found.one_by_one
        assert engine.max_examples(9) == 1 and not engine.capture.map.hooked_modules


class Shared(nn.Module):
    """A vector in a dictionary that two layers share, each used inside a module of its own."""

    class Scale(nn.Module):
        def __init__(self, bank):
            super().__init__()
            self.bank, self.inner = bank, nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) * self.bank["v"]

    def __init__(self):
        super().__init__()
        bank = nn.ParameterDict({"v": nn.Parameter(torch.randn(4))})
        self.first, self.second = self.Scale(bank), self.Scale(bank)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_vector_shared_by_layers_adds_up_its_uses(plan):
    """T4."""
    torch.manual_seed(0)
    model = Shared()
    examples = [(torch.randn(5, 4), i) for i in range(3)]

    def losses(chosen):
        return class_losses(model(torch.stack([x for x, _ in chosen])).mean(1), torch.tensor([y for _, y in chosen]))

    with Engine(model, plan()) as engine:
        found = preflight(engine, losses, examples)
        assert {hooked.name for hooked in engine.capture.map.hooked_modules} == {
            "first",
            "first.inner",
            "second",
            "second.inner",
        }
    assert found.techniques == {"functional": 4, "rule": 40} and found.max_relative_error < 1e-5


def test_functional_differentiation_in_chunks_is_the_same(case, plan, monkeypatch):
    made = case("bert")
    made.model = Subset("ia3 + layers('*token_type*')").apply(made.model).eval()
    rows = []
    for scalars in (1 << 26, 1):
        monkeypatch.setattr(capture, "MATERIALISED", scalars)
        with Engine(made.model, plan()) as engine:
            rows.append(engine.capture.rows(made.losses(made.examples)).clone())
    torch.testing.assert_close(*rows)


class Positioned(nn.Module):
    """Adds a trained multiple of each token's position, which is a tensor ``(T,)`` without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(4))

    def forward(self, x, positions):
        return torch.tanh(x + positions.unsqueeze(-1) * self.slope)


def test_a_tensor_as_long_as_the_batch_is_not_taken_for_it(plan):
    """T3: five tokens, five examples."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"positioned": Positioned(), "head": nn.Linear(4, 3)})
    examples = [(torch.randn(5, 4), i % 3) for i in range(5)]

    def losses(chosen):
        x = torch.stack([x for x, _ in chosen])
        hidden = model["positioned"](x, torch.arange(5.0) / 5).mean(1)
        return class_losses(model["head"](hidden), torch.tensor([y for _, y in chosen]))

    with Engine(model, plan()) as engine:
        assert preflight(engine, losses, examples[:3]).techniques == {"functional": 4, "rule": 15}
        rows = engine.capture.rows(losses(examples)).clone()
        for i, example in enumerate(examples):
            torch.testing.assert_close(rows[i], engine.capture.rows(losses([example]))[0])


class Masked(nn.Module):
    """Takes a mask that is ``(B, T, 1)`` where something is padded and ``(1, T, 1)``, or none at all, where nothing
    is."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x, mask=None):
        return torch.tanh(x * self.scale if mask is None else x * self.scale * mask)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("known", [2, 3])
def test_a_mask_that_changes_its_form_without_padding_never_mixes_examples(absent, known, plan):
    """T3: after a batch without padding, the next padded one is still taken example by example."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"masked": Masked(), "head": nn.Linear(4, 3)})
    examples = [(torch.randn(length, 4), length % 3) for length in (3, 4, 6, 6)]

    def losses(chosen):
        lengths = [len(x) for x, _ in chosen]
        x = nn.utils.rnn.pad_sequence([x for x, _ in chosen], batch_first=True)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).float().unsqueeze(2)
        if min(lengths) == max(lengths):
            mask = None if absent else mask[:1]
        hidden = model["masked"](x, mask).sum(1) / torch.tensor(lengths).unsqueeze(1)
        return class_losses(model["head"](hidden), torch.tensor([y for _, y in chosen]))

    with Engine(model, plan()) as engine:
        preflight(engine, losses, examples[:known])
        alone = [engine.capture.rows(losses([example]))[0].clone() for example in examples]
        for batch in ([0, 1, 2], [2, 3], [0, 1, 2], [3, 2, 0, 1]):
            rows = engine.capture.rows(losses([examples[i] for i in batch]))
            for row, i in zip(rows, batch, strict=True):
                torch.testing.assert_close(row, alone[i])


def test_a_call_of_a_form_that_was_not_seen_is_refused(plan):
    """T3: which of its tensors carry the batch could only be guessed."""
    model = nn.ModuleDict({"masked": Masked(), "head": nn.Linear(4, 3)})
    examples = [(torch.randn(5, 4), i) for i in range(3)]

    def losses(chosen, mask=None):
        hidden = model["masked"](torch.stack([x for x, _ in chosen]), mask).mean(1)
        return class_losses(model["head"](hidden), torch.tensor([y for _, y in chosen]))

    with Engine(model, plan()) as engine:
        preflight(engine, losses, examples)
        with pytest.raises(ExactnessError, match="in a form that no preflight example had"):
            engine.accumulate(losses(examples, torch.ones(3, 5, 1)))


class Routed(nn.Module):
    """Experts see the tokens routed to them: as many as there are examples by chance, or none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens, flat = x.flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], 4)
        choice = (tokens[:, 0] > 0).long()  # the third expert waits for tokens that no preflight example has
        choice[tokens[:, 0] > 9] = 2
        for i, expert in enumerate(self.experts):
            places = torch.nonzero(choice == i)[:, 0]
            flat = flat.index_copy(0, places, expert(tokens[places]) if len(places) else tokens[places])
        return self.head(flat.view_as(x).mean(1))


def routed_case(tokens):
    torch.manual_seed(0)
    model = Routed()
    examples = [(x.unsqueeze(1) * torch.ones(4), i % 3) for i, x in enumerate(tokens)]

    def losses(chosen):
        return class_losses(model(torch.stack([x for x, _ in chosen])), torch.tensor([y for _, y in chosen]))

    return model, losses, examples


def test_experts_whose_tokens_happen_to_number_the_batch_are_not_taken_for_it(plan):
    """T3: of two tokens per example one goes to each expert, so an expert's input looks like a batch of examples."""
    mixed = [torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0]), torch.tensor([3.0, -1.5])]
    model, losses, examples = routed_case(mixed)
    with Engine(model, plan(clip=FlatClip(1e6))) as engine:
        found = preflight(engine, losses, examples)
        assert "experts.2 (Linear) was not reached" in found.one_by_one
        # Here the last expert gets two tokens of one example, the batch size, and the first none.
        odd = routed_case([torch.tensor([10.0, 11.0]), torch.tensor([1.0, 2.0])])[2]
        rows = engine.capture.rows(losses(odd)).clone()
        for i, example in enumerate(odd):
            torch.testing.assert_close(rows[i], engine.capture.rows(losses([example]))[0])


def test_a_wrong_technique_is_replaced_by_a_right_one(case, plan, monkeypatch):
    """Whatever a layer's rule says, one example at a time is the truth."""
    made = case("bert")
    made.model = Subset("head").apply(made.model)
    record = Capture._record

    def wrong(self, hooked, grad_output, *call):
        record(self, hooked, grad_output * 1.001, *call)

    monkeypatch.setattr(Capture, "_record", wrong)
    with Engine(made.model, plan()) as engine:
        found = preflight(engine, made.losses, made.examples)
    assert found.techniques == {"per example": 323} and "came out wrong" in found.one_by_one


def test_a_wrong_technique_shows_though_a_fresh_adapter_has_no_gradient_there(case, plan, monkeypatch):
    """B = 0 makes every gradient of A zero, and a hundredth more of zero is zero: so the proof moves what trains."""
    made = case("bert")
    made.model = Subset("lora(targets='query', last_blocks=1)").apply(made.model)
    record = Capture._record

    def wrong(self, hooked, grad_output, *call):
        record(self, hooked, grad_output * (1.01 if "lora_A" in hooked.name else 1.0), *call)

    monkeypatch.setattr(Capture, "_record", wrong)
    with Engine(made.model, plan()) as engine:
        found = preflight(engine, made.losses, made.examples)
        assert not any("lora_A" in hooked.name for hooked in engine.capture.map.hooked_modules), found.techniques


class Noisy(nn.Module):
    """Draws a random number for every activation, as probabilistic tuners do."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * (self.scale + torch.randn_like(x) * self.scale.exp())


def test_a_layer_that_draws_random_numbers_is_not_differentiated_a_second_time(plan):
    """A second forward would draw other numbers, so its gradient would be that of another function."""
    model, losses, examples = frozen_images(nn.Sequential())
    model.middle = nn.Sequential(nn.Flatten(2), nn.Linear(36, 4), Noisy(), nn.Linear(4, 36))
    with Engine(model, plan()) as engine:
        found = preflight(engine, losses, examples)
    assert "middle.2 (Noisy) draws random numbers" in found.one_by_one


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("subset", ["lora(rank=2)", "lora(rank=2, dora=True) + norms", "sparse(fraction=0.1)", "all"])
def test_gradient_checkpointing_is_exact(subset, reentrant, case, plan):
    """Each layer runs twice and counts once, with both of PyTorch's implementations."""
    made = case("llama")
    made.model = Subset(subset).apply(made.model)
    if reentrant:
        made.model.enable_input_require_grads()
    made.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with Engine(made.model, plan()) as engine:
        found = preflight(engine, made.losses, made.examples)
        assert found.max_relative_error < 1e-5
        checkpointed = engine.capture.rows(made.losses(made.examples)).clone()
        made.model.activation_checkpointing_disable()
        torch.testing.assert_close(checkpointed, engine.capture.rows(made.losses(made.examples)))


@pytest.mark.parametrize("subset", ["lora(rank=2)", "norms", "sparse(fraction=0.1)"])
def test_a_bf16_base_is_proven_in_float32_and_runs_in_bf16(subset, case, plan):
    made = case("llama")
    made.model = Subset(subset).apply(made.model.to(torch.bfloat16))
    with Engine(made.model, plan()) as engine:
        found = preflight(engine, made.losses, made.examples)
        assert found.max_relative_error < 1e-5
        engine.accumulate(made.losses(made.examples))
        engine.release()
    base = [p for p in made.model.parameters() if not p.requires_grad]
    assert base and all(p.dtype == torch.bfloat16 for p in base)


def test_autocast_is_proven_without_it_and_runs_with_it(case, plan):
    made = case("gpt2")
    made.model = Subset("lora(rank=2) + norms + layers('*.0.mlp.*')").apply(made.model)

    def autocast(examples):
        with torch.autocast("cpu", torch.bfloat16):
            return made.losses(examples)

    with Engine(made.model, plan()) as engine:
        found = preflight(engine, autocast, made.examples, made.losses)
        assert found.max_relative_error < 1e-5 and found.one_by_one is None
        engine.accumulate(autocast(made.examples))
        engine.release()


def test_a_subset_that_the_loss_ignores_is_refused(case, plan):
    made = case("bert")
    made.model.unused = nn.Linear(2, 2)
    made.model = Subset("layers('unused*')").apply(made.model)
    with Engine(made.model, plan()) as engine, pytest.raises(GuaranteeError, match="No trainable parameter gets"):
        preflight(engine, made.losses, made.examples)


def test_what_was_found_is_taken_up_again(case, plan, tmp_path):
    """A resumed run need not prove the same model twice."""
    first = case("bert")
    first.model = Subset("layers('*token_type*') + ia3").apply(first.model).eval()
    second = case("bert")
    second.model = Subset("layers('*token_type*') + ia3").apply(second.model).eval()
    with Engine(first.model, plan()) as engine:
        preflight(engine, first.losses, first.examples)
        found, path = engine.capture.findings, tmp_path / "private" / "preflight.json"
        found.save(path, fingerprint(first.model))
        assert engine.capture.forms_known
        expected = engine.capture.rows(first.losses(first.examples)).clone()
    assert fingerprint(first.model) == fingerprint(second.model)
    with Engine(second.model, plan()) as engine:
        known = Findings.load(path, fingerprint(second.model))
        assert known == found
        engine.capture.adopt(known)
        assert engine.capture.forms_known
        torch.testing.assert_close(engine.capture.rows(second.losses(second.examples)), expected)
    assert fingerprint(first.model, first.losses) is None  # code that no version tells apart
    assert Findings.load(path, None) is Findings.load(path, "another") is Findings.load(tmp_path / "none", "") is None
    path.write_text(json.dumps({"key": "old", "state": {}, "found": {}}))  # as dpft 0.2.0 wrote it
    assert Findings.load(path, "old") is None
    second.model.config.hidden_dropout_prob = 0.7
    assert fingerprint(first.model) != fingerprint(second.model)


def test_a_model_that_needs_a_pass_for_each_example_needs_it_when_it_goes_on(case, plan):
    made = case("bert")
    made.model = Subset("head").apply(made.model)
    with Engine(made.model, plan()) as engine:
        preflight(engine, made.losses, made.examples)
        findings = engine.capture.findings
    choices = replace(findings.choices, one_by_one="a layer was wrong")
    with Engine(made.model, plan()) as engine:
        assert engine.max_examples(8) > 1
        engine.capture.adopt(replace(findings, choices=choices))
        assert engine.max_examples(8) == 1 and not engine.capture.map.hooked_modules


def test_a_loss_that_a_longer_neighbour_moves_by_a_hundredth_is_refused(case, plan):
    """T2: no gradient shows it, because what is added is a constant."""
    made = case("bert")
    made.model = Subset("head").apply(made.model)
    longest = lambda examples: max(len(example["input_ids"]) for example in examples)
    losses = lambda examples: made.losses(examples) + 0.01 * longest(examples)
    with Engine(made.model, plan()) as engine, pytest.raises(IsolationError):
        preflight(engine, losses, made.examples)


def test_a_loss_divided_by_the_batch_is_refused(case, plan):
    """T1: the Hugging Face loss averages over the tokens of the batch."""
    made = case("gpt2")
    made.model = Subset("lora").apply(made.model)

    def coupled(examples):
        batch = made.batch(examples)
        loss = made.model(**batch).loss  # the mean over all tokens of the batch
        return loss.expand(len(examples)) / len(examples) + 0 * made.losses(examples)

    with Engine(made.model, plan()) as engine, pytest.raises(IsolationError, match="own loss"):
        preflight(engine, coupled, made.examples)


def test_padding_without_a_mask_is_refused(case, plan):
    """T2."""
    made = case("bert")
    made.model = Subset("lora").apply(made.model)

    def unmasked(examples):
        batch = made.batch(examples)
        return class_losses(made.model(input_ids=batch["input_ids"]).logits, batch["labels"])

    with Engine(made.model, plan()) as engine, pytest.raises(IsolationError, match="attention mask"):
        preflight(engine, unmasked, made.examples)


class Images(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(1, 4, 3), middle, nn.Linear(4 * 36, 3)

    def forward(self, pixels):
        return self.head(self.middle(self.stem(pixels)).flatten(1))


class BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def frozen_images(middle):
    torch.manual_seed(0)
    model = Images(middle)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    examples = [{"pixels": torch.randn(1, 8, 8), "label": i} for i in range(3)]

    def losses(chosen):
        logits = model(torch.stack([e["pixels"] for e in chosen]))
        return class_losses(logits, torch.tensor([e["label"] for e in chosen]))

    return model, losses, examples


def test_frozen_batch_norm_left_in_train_mode_is_refused_by_name(plan):
    """T2: its running statistics take in the data un-noised, and its output mixes examples."""
    model, losses, examples = frozen_images(nn.BatchNorm2d(4))
    with Engine(model, plan()) as engine, pytest.raises(IsolationError, match=r"middle \(BatchNorm2d\).*GroupNorm"):
        preflight(engine, losses, examples)


class Remembering(nn.Module):
    """Keeps the largest value it ever saw: its output is each example's own, its buffer is everyone's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest = torch.maximum(self.largest, x.detach().max())
        return x


def test_a_buffer_that_takes_in_data_is_refused_by_name(plan):
    """T2, T5: it would be saved with the weights, un-noised."""
    model, losses, examples = frozen_images(Remembering())
    with (
        Engine(model, plan()) as engine,
        pytest.raises(IsolationError, match=r"middle \(Remembering\) changes its buffer middle.largest"),
    ):
        preflight(engine, losses, examples)


class RememberingWeight(nn.Module):
    """The same in a weight."""

    def __init__(self):
        super().__init__()
        self.largest = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        self.largest.data = torch.maximum(self.largest.data, x.detach().max())
        return x


def test_a_weight_that_takes_in_data_is_refused_by_name(plan):
    """T5."""
    model, losses, examples = frozen_images(RememberingWeight())
    with Engine(model, plan()) as engine, pytest.raises(IsolationError, match="changes the parameter middle.largest"):
        preflight(engine, losses, examples)


@pytest.mark.parametrize("trains", [True, False])
def test_an_embedding_that_shrinks_its_rows_is_refused(case, plan, trains):
    """T5: in every forward pass, un-noised, the rows of the words that occur."""
    made = case("bert")
    made.model = Subset("layers('*word_embeddings*')" if trains else "head").apply(made.model)
    words = next(m for n, m in made.model.named_modules() if n.endswith("word_embeddings"))
    words.max_norm = 1.0
    with Engine(made.model, plan()) as engine:
        with pytest.raises(IsolationError, match="max_norm=1"):
            preflight(engine, made.losses, made.examples)
        if trains:
            with pytest.raises(IsolationError, match="max_norm=1"):
                engine.accumulate(made.losses(made.examples))


def test_texts_that_only_long_ones_change_are_refused(plan):
    """T2: with dynamic frequencies the longest text of a batch decides how all positions are told apart."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    model = Subset("layers('*o_proj*')").apply(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, initializer_range=0.3, max_position_embeddings=10, rope_parameters=rope)
        )
    )
    ids = lambda n: torch.randint(3, 50, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    short, long = (
        [{"input_ids": ids(n), "labels": ids(n)} for n in (4, 5, 6)],
        {"input_ids": ids(14), "labels": ids(14)},
    )

    def losses(chosen):
        batch = pad_features(chosen, 0, token_labels=True)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        return token_losses(model(**inputs).logits, batch["labels"], shift=True)

    with Engine(model, plan()) as engine:
        assert preflight(engine, losses, short, longest=short[-1]).isolated
        with pytest.raises(IsolationError, match=r"rotary_emb.inv_freq in the forward pass"):
            preflight(engine, losses, short, longest=long)


def test_padding_that_only_long_texts_bring_is_refused(plan):
    """T2: FNet mixes whatever its texts are padded with; texts of one length show nothing."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, intermediate_size=16, hidden_dropout_prob=0.0)
    model = Subset("head").apply(
        transformers.FNetForSequenceClassification(transformers.FNetConfig(**sizes, initializer_range=0.3))
    )
    ids = lambda n, seed: torch.randint(3, 50, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    equal, long = [{"input_ids": ids(6, i), "labels": i % 2} for i in range(3)], {"input_ids": ids(9, 9), "labels": 0}

    def losses(chosen):
        batch = pad_features(chosen, 0, token_labels=False)
        return class_losses(model(input_ids=batch["input_ids"]).logits, batch["labels"])

    def lost(chosen):
        found = losses(chosen)
        return found * torch.nan if long in chosen else found

    with Engine(model, plan()) as engine:
        with pytest.raises(IsolationError, match="changes by nan"):
            preflight(engine, lost, equal, longest=long)
        assert preflight(engine, losses, equal).isolated
        with pytest.raises(IsolationError, match="when others share its batch.*pass an attention mask"):
            preflight(engine, losses, equal, longest=long)


@pytest.mark.parametrize("middle", [nn.BatchNorm2d(4, track_running_stats=False), BatchMean()])
def test_a_layer_that_mixes_examples_is_refused_by_name(middle, plan):
    """T2."""
    model, losses, examples = frozen_images(middle)
    with (
        Engine(model, plan()) as engine,
        pytest.raises(IsolationError, match=rf"layer middle \(\S*{type(middle).__name__}\)"),
    ):
        preflight(engine, losses, examples)


def test_group_norm_passes(plan):
    model, losses, examples = frozen_images(nn.GroupNorm(2, 4))
    with Engine(model, plan()) as engine:
        assert preflight(engine, losses, examples).exact


def test_one_example_proves_nothing(case, plan):
    made = case("bert")
    with Engine(made.model, plan()) as engine, pytest.raises(GuaranteeError, match="two or more"):
        preflight(engine, made.losses, made.examples[:1])


def test_a_parameter_used_outside_its_layer_is_found(plan):
    """T4: a use that no hook sees would be lost."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)})
    examples = [(torch.randn(4), i) for i in range(3)]

    def losses(chosen):
        x = torch.stack([x for x, _ in chosen])
        hidden = torch.tanh(model["a"](x)) @ model["a"].weight.T
        return class_losses(model["b"](hidden), torch.tensor([y for _, y in chosen]))

    with Engine(model, plan()) as engine:
        with pytest.raises(ExactnessError, match="a.weight .*outside its layer"):
            engine.accumulate(losses(examples))
        engine.discard()
        found = preflight(engine, losses, examples)
    assert found.max_relative_error < 1e-5 and found.techniques["per example"] >= 16


def test_dropout_does_not_disturb_the_proof(case, plan):
    made = case("bert")
    made.model = Subset("lora(dropout=0.5) + head").apply(made.model)
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in made.model.modules())
    with Engine(made.model, plan()) as engine:
        assert preflight(engine, made.losses, made.examples).max_relative_error < 1e-5


def test_padding_id_that_occurs_in_a_text_is_exact(plan):
    """The embedding's padding row gets no gradient, also where a text contains that token."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    model = Subset("layers('*word_embeddings*')").apply(transformers.BertForSequenceClassification(config))
    examples = [{"input_ids": [5, 0, 7], "labels": 0}, {"input_ids": [0, 3, 4, 9], "labels": 1}]

    def losses(chosen):
        batch = pad_features(chosen, 0, token_labels=False)
        return class_losses(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )

    with Engine(model, plan()) as engine:
        assert preflight(engine, losses, examples).techniques == {"rule": 480}


def test_an_error_that_is_no_number_is_the_worst(case, plan):
    """T22: a NaN in one parameter is not forgotten for a large error in the next."""
    made = case("bert")
    model = Subset("head").apply(made.model)
    with Engine(model, plan()) as engine:
        capture = engine.capture
        expected = torch.ones(capture.map.size)
        found = expected.clone()
        first, last = capture.map.trainables[0], capture.map.trainables[-1]
        found[first.slice] = torch.nan
        found[last.slice] = 100.0
        worst, error = worst_parameter(capture, found, expected)
    assert worst is first and error != error
