"""The objective and the held-out score: what they count, and that padding changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from blt_plugins.training.data.windows import Texts, cut_windows, make_batch
from blt_plugins.training.objectives.next_byte import NextByte, NextByteParams
from blt_plugins.training.scores.held_out import evaluate_model, evaluate_scorer

TEXTS = [b"def f(x):\n    return x\n", b"import os\n", b"a"]


@pytest.fixture
def model(new_job):
    model = new_job().model.to("cpu", torch.float64)
    model.patcher.threshold = 5.55
    torch.manual_seed(0)
    for parameter in model.module_dict().parameters():  # so that bytes differ in their loss
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model


def batch_of(texts, model):
    documents = Texts(texts)
    return make_batch(documents, cut_windows(documents, 64), model.scheme)


@torch.no_grad()
def loss_of(model, batch) -> float:
    flags = model.patcher.flags(batch.rows, None)
    objective = NextByte(NextByteParams(), None)
    return float(objective.loss(model, batch.rows, flags, batch.targets_br, torch.Generator())[0])


@torch.no_grad()
def nats(model, text: bytes) -> float:
    """Of a text and its end: row by row, by hand."""
    batch = batch_of([text], model)
    flags = model.patcher.flags(batch.rows, None)
    log_probs = model.forward(batch.rows, flags).clean.logits[0].log_softmax(-1)
    targets = [*model.scheme.encode(text), model.scheme.eos]
    return -float(sum(log_probs[row, target] for row, target in enumerate(targets)))


def test_the_loss_is_the_mean_over_all_bytes_and_ends_padding_left_out(model):
    batch = batch_of(TEXTS, model)
    assert batch.rows.ids_br.numel() > batch.scored
    expected = sum(nats(model, text) for text in TEXTS) / sum(len(text) + 1 for text in TEXTS)
    assert loss_of(model, batch) == pytest.approx(expected, rel=1e-12)


def test_every_trained_parameter_gets_a_gradient(model):
    batch = batch_of(TEXTS, model)
    flags = model.patcher.flags(batch.rows, None)
    objective = NextByte(NextByteParams(), None)
    objective.loss(model, batch.rows, flags, batch.targets_br, torch.Generator())[0].backward()
    for name, parameter in model.module_dict().named_parameters():
        trained = not name.startswith("patcher.")
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moved == trained, name


def test_bits_per_byte_is_the_cost_of_the_texts_by_their_bytes(model):
    batches = [batch_of(TEXTS[:2], model), batch_of(TEXTS[2:], model)]
    result = evaluate_model(model, batches)
    size = sum(map(len, TEXTS))
    assert result.bytes == size
    expected = sum(nats(model, text) for text in TEXTS) / math.log(2) / size
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-6)  # logits are scored in fp32


def test_mean_patch_length_counts_the_patches_of_text_bytes(model):
    batch = batch_of(TEXTS, model)
    patches = 0
    for row, text in enumerate(TEXTS):
        patches += int(model.patcher.flags(batch.rows, None)[row, : len(text)].sum())
    result = evaluate_model(model, [batch])
    assert result.mean_patch_bytes == pytest.approx(sum(map(len, TEXTS)) / patches)
    assert 1 < result.mean_patch_bytes < 8


def test_a_scorer_that_knows_nothing_costs_log2_of_the_ids(model):
    scorer = model.patcher.byte_scorer
    scorer.head.weight.data.zero_()
    text = b"x" * 63
    result = evaluate_scorer(scorer, [batch_of([text], model)], model.scheme)
    assert result.bits_per_byte == pytest.approx(math.log2(259) * 64 / 63)
    assert result.bits_per_byte_without_eos == pytest.approx(math.log2(259))
