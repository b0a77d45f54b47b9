"""Held-out scores: masked accuracy against the plain reference, drafts against the engine."""

from __future__ import annotations

import json

import pytest

from blt_core.cli.app import run
from blt_core.compare import repeats
from blt_core.errors import DataError
from blt_core.pipeline import Pipeline
from blt_core.testing.reference import block_logits, row_logits, true_flags
from blt_plugins.training.data.prefixes import batched, prefixes
from blt_plugins.training.data.windows import Texts, cut_windows, make_batch
from blt_plugins.training.objectives.block_diffusion import sample_starts
from blt_plugins.training.run.trainer import Trainer
from blt_plugins.training.scores import accuracy
from blt_plugins.training.scores.acceptance import acceptance
from blt_plugins.training.scores.accuracy import STARTS, block_accuracy, masked_accuracy
from tests.engine.models import model as tiny_model
from tests.engine.models import shape

TEXTS = [b"def f(x):\n    return x + 1\n", b"import os, sys\nprint(os.getcwd())\n"]
MODELS = [index for index in range(9) if not shape(index).reads_byte_states]


def best(model, logits) -> list[int]:
    allowed = logits.clone()
    allowed[..., list(model.scheme.never_output)] = float("-inf")
    return allowed.argmax(-1).tolist()


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("index", MODELS)
def test_accuracy_is_that_of_each_block_and_row_alone(index, starts, monkeypatch):
    model, size = tiny_model(index), 5
    # Every allowed start, where otherwise as many are drawn as there are patches.
    monkeypatch.setattr(accuracy, "sample_starts", all_starts)
    batch = make_batch(Texts(TEXTS), cut_windows(Texts(TEXTS), 100), model.scheme)
    found = block_accuracy(model, [batch], size, starts)
    counts, masked, own = [0] * size, [0] * size, [0] * size
    for text in TEXTS:
        ids = [model.scheme.bos, *model.scheme.encode(text), model.scheme.eos]
        flags = true_flags(model, ids[:-1])
        choices = best(model, row_logits(model, ids[:-1], flags))
        inside = [i for i in range(1, len(ids)) if not flags[i]]
        opens = [i for i in range(1, len(ids)) if flags[i]]
        for start in opens if starts == "aligned" else inside:
            # Nothing but the text before the block is given, so nothing after can leak.
            block = [model.scheme.mask] * size
            logits = block_logits(model, ids[:start], flags[: start + 1], block, start)
            for j, choice in enumerate(best(model, logits)[: len(ids) - start]):
                counts[j] += 1
                masked[j] += choice == ids[start + j]
                own[j] += choices[start + j - 1] == ids[start + j]
    assert list(found.counts) == counts
    assert found.masked == pytest.approx(
        [n / max(c, 1) for n, c in zip(masked, counts, strict=True)]
    )
    assert found.autoregressive == pytest.approx(
        [n / max(c, 1) for n, c in zip(own, counts, strict=True)]
    )


def all_starts(places, count, rng):
    """In place of sample_starts: every allowed start, whatever the share."""
    return sample_starts(places, places.sum(1), rng)


@pytest.mark.parametrize("index", MODELS)
def test_masked_accuracy_is_that_of_each_block_alone(index, monkeypatch):
    model, size, drawn = tiny_model(index), 5, []
    draw = accuracy._drawn

    def kept(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(accuracy, "sample_starts", all_starts)
    monkeypatch.setattr(accuracy, "_drawn", kept)
    batch = make_batch(Texts(TEXTS), cut_windows(Texts(TEXTS), 100), model.scheme)
    found = masked_accuracy(model, [batch], size, (0.5, 1.0), seed=3)
    ((start_bn, noise),) = drawn
    for rate in (0.5, 1.0):
        right = count = 0
        for row, window in enumerate(cut_windows(Texts(TEXTS), 100)):
            text = TEXTS[window.document]
            ids = [model.scheme.bos, *model.scheme.encode(text), model.scheme.eos]
            flags = true_flags(model, ids[:-1])
            for n, start in enumerate(start_bn[row].tolist()):
                if start == 0:
                    continue  # padding
                truth = ids[start : start + size]
                hidden = [bool(noise[row, n, j] < rate) for j in range(len(truth))]
                given = [model.scheme.mask if h else t for h, t in zip(hidden, truth, strict=True)]
                given += [model.scheme.mask] * (size - len(truth))
                logits = block_logits(model, ids[:start], flags[: start + 1], given, start)
                named = best(model, logits)
                right += sum(h and named[j] == truth[j] for j, h in enumerate(hidden))
                count += sum(hidden)
        assert count > 20
        assert found[str(rate)] == pytest.approx(right / count)


@pytest.mark.parametrize("index", MODELS)
def test_masked_accuracy_at_rate_one_is_that_of_aligned_blocks(index, monkeypatch):
    monkeypatch.setattr(accuracy, "sample_starts", all_starts)
    model = tiny_model(index)
    batch = make_batch(Texts(TEXTS), cut_windows(Texts(TEXTS), 100), model.scheme)
    blocks = block_accuracy(model, [batch], 5, "aligned")
    right = sum(n * share for n, share in zip(blocks.counts, blocks.masked, strict=True))
    found = masked_accuracy(model, [batch], 5, (1.0,))
    assert found == {"1.0": pytest.approx(right / sum(blocks.counts))}


def test_the_bound_of_a_pass_does_not_change_what_is_measured(monkeypatch):
    model, widths = tiny_model(MODELS[0]), []
    batch = make_batch(Texts(TEXTS * 2), cut_windows(Texts(TEXTS * 2), 100), model.scheme)
    original = accuracy._block_ids

    def watched(*arguments):
        widths.append(arguments[3].shape[1])
        return original(*arguments)

    monkeypatch.setattr(accuracy, "_block_ids", watched)

    def measured():
        widths.clear()
        masked = masked_accuracy(model, [batch], 4, (0.3, 0.6, 1.0), seed=1)
        return masked, block_accuracy(model, [batch], 4, "aligned", seed=1)

    whole = measured()
    assert max(widths) > 2
    monkeypatch.setattr(accuracy, "BLOCKS", 2)
    assert measured() == whole
    assert max(widths) == 2


@pytest.fixture
def trained(model_of):
    """The folder of a trained model whose decoder does not denoise."""
    return model_of()


@pytest.fixture
def pipeline(trained):
    return Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(trained)}})


def test_acceptance_is_what_the_first_draft_after_each_prompt_achieves(pipeline):
    prompts = prefixes(Texts(TEXTS), 12, longest=20)
    found = acceptance(pipeline, "blt-s draft_bytes=4", batched(prompts, 5))
    verified = pipeline.with_sampler("blt-s draft_bytes=4")
    stood = []
    for prompt in prompts:
        for step in verified.steps([prompt], max_new_bytes=40):
            if step.progress[0].rounds:
                stood.append(step.progress[0].accepted)
                break
    assert found.rounds == len(stood) == 12
    assert found.accepted == sum(stood)
    assert found.reached == (12, 12, 12, 12)
    assert found.by_place == pytest.approx([sum(a > i for a in stood) / 12 for i in range(4)])
    assert found.accepted_share == pytest.approx(sum(stood) / 48)
    assert found.bytes_per_round == pytest.approx(1 + sum(stood) / 12)


def test_a_sampler_that_verifies_nothing_has_bytes_a_round_but_no_acceptance(pipeline):
    found = acceptance(pipeline, "ar", [[b"def ", b"x"]])
    assert (found.rounds, found.drafted, found.accepted_share) == (2, 0, None)
    assert found.bytes_per_round == 1
    nothing = acceptance(pipeline, "ar", [])
    assert (nothing.rounds, nothing.bytes_per_round, nothing.by_place) == (0, None, ())


def test_prefixes_end_at_places_of_the_text_and_are_the_same_for_a_seed():
    texts = [b"abcdefghijklmnop", b"", b"x", b"0123456789"]
    documents = Texts(texts)
    found = prefixes(documents, 50, longest=4, seed=3)
    assert found == prefixes(documents, 50, longest=4, seed=3) != prefixes(documents, 50, longest=4)
    assert all(1 <= len(p) <= 4 and any(p in text for text in (texts[0], texts[3])) for p in found)
    assert [len(p) for group in batched(found, 7) for p in group] == sorted(map(len, found))
    with pytest.raises(DataError, match="no held-out text to draft after"):
        prefixes(Texts([b"", b"x"]), 1, longest=4)


@pytest.mark.parametrize(
    ("texts", "share"),
    [([b"abcd"], 0.0), ([b"abababab"], 3 / 5), ([b"aaaa", b"abcdef"], 0.0), ([], 0.0)],
)
def test_repeats_are_runs_that_stood_in_the_same_text_before(texts, share):
    assert repeats(texts, 4) == pytest.approx(share)


def test_evaluate_reports_scores_for_people_and_machines(trained, texts, capsys):
    arguments = ["evaluate", str(trained), str(texts), "--rounds", "3", "--max-bytes", "200"]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "bits per byte" in shown
    assert "blt-s draft_bytes=16" in shown
    assert run([*arguments, "--json", "--sampler", "blt-s draft_bytes=2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["blocks"] == []  # this decoder does not denoise
    assert [each["sampler"] for each in record["acceptance"]] == ["blt-s draft_bytes=2"]
    assert record["acceptance"][0]["rounds"] == 3
    assert record["bits_per_byte"] > 0
    assert 0 <= record["top1"] <= 1


def test_evaluate_scores_the_blocks_of_a_decoder_that_denoises(
    tables, new_job, silent, texts, capsys
):
    tables["decoder"]["denoises"] = True
    tables["objective"] = {"use": "block-diffusion", "block_bytes": 4}
    job = new_job()
    Trainer(job, silent()).run()
    arguments = ["evaluate", str(job.out / "model"), str(texts), "--rounds", "2"]
    assert run([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [each["starts"] for each in record["blocks"]] == ["aligned", "inside"]
    for each in record["blocks"]:
        assert len(each["masked"]) == len(each["autoregressive"]) == len(each["counts"]) == 4
        for masked, own, ratio in zip(
            each["masked"], each["autoregressive"], each["ratios"], strict=True
        ):
            assert ratio == (pytest.approx(masked / own) if own else None)
    assert len(record["acceptance"]) == 4
    assert all("block_bytes=4" in each["sampler"] for each in record["acceptance"][1:])
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "aligned blocks, all masked" in shown.out
    assert "trained on blocks" not in shown.err, "blocks are as long as those it was trained on"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--sampler", "blt-dv block_bytes=4"), "needs a decoder that denoises"),
        (("--sampler", "blt-q"), "blt-q"),
        (("--context-bytes", "65"), "--context-bytes: 65 is more than the model serves (64)"),
    ],
)
def test_evaluate_refuses_samplers_that_the_model_cannot_run(
    trained, texts, capsys, change, message
):
    assert run(["evaluate", str(trained), str(texts), *change]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_names_text_that_is_not_there(trained, tmp_path, capsys):
    assert run(["evaluate", str(trained), str(tmp_path / "nothing.py")]) == 2
    assert "nothing.py" in capsys.readouterr().err
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    assert run(["evaluate", str(trained), str(empty)]) == 2
    assert "all files are empty" in capsys.readouterr().err
    hidden = tmp_path / "folder/.git/config"
    hidden.parent.mkdir(parents=True)
    hidden.write_bytes(b"text")
    assert run(["evaluate", str(trained), str(tmp_path / "folder")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert run(["evaluate", "blt-1b", str(empty)]) == 2
    assert "run.checkpoint: missing; only a trained model" in capsys.readouterr().err


def test_evaluate_judges_drafts_greedily_whatever_the_config_says(trained, texts, tmp_path, capsys):
    config = tmp_path / "warm.toml"
    config.write_text(f'schema = 1\n[run]\ncheckpoint = "{trained}"\ntemperature = 0.8\n')
    assert run(["evaluate", str(config), str(texts), "--rounds", "2"]) == 0
    assert "blt-s" in capsys.readouterr().out


def test_a_text_without_a_start_of_one_kind_is_scored_all_the_same():
    model = tiny_model(MODELS[0])
    batch = make_batch(Texts([b"x"]), cut_windows(Texts([b"x"]), 1), model.scheme)
    found = block_accuracy(model, [batch], 4, "inside")
    assert found.counts == (0, 0, 0, 0)
    assert found.masked == found.ratios == (None,) * 4
