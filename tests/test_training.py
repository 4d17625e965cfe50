"""Batches, the optimiser in fp32 under a model in bfloat16, and whether training fits the memory."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import hf
from transformers import AutoModelForCausalLM, AutoTokenizer

import baselines
import memory
import rmu
import robustness
import training
from common import load_hf, load_model
from data import UserError, load_benchmark, special_ids
from edits import decoder_layers
from flags import settings
from training import QUESTION_TOKENS, Master, reach, training_windows
from unlearning import lora_matrices, with_lora

TEXTS = ["The cat sat on the mat and looked at the moon.", "Rivers of Europe flow to the sea.",
         "Blood carries oxygen from the lungs to the heart."]  # fmt: skip


def test_each_text_once_a_pass_in_an_order_that_the_seed_decides():
    drawn = training.passes(list(range(9)), 4, random.Random(0))
    for _ in range(3):
        assert len(set(next(drawn) + next(drawn))) == 8  # the ninth is too few for a batch
    again = training.passes(list(range(9)), 4, random.Random(0))
    assert [next(again) for _ in range(6)] != [next(drawn) for _ in range(6)]
    assert sorted(next(training.passes([1, 2], 4, random.Random(0)))) == [1, 2]


def test_a_loss_that_is_no_number_ends_training():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="the loss is no number"):
        Master([weight], 1.0).step((weight * torch.nan).sum())
    assert torch.equal(weight.detach(), torch.ones(2))


def test_the_rate_falls_to_0_in_a_line_or_stays():
    def rates(steps):
        master, found = Master([torch.nn.Parameter(torch.ones(2))], 0.4, steps=steps), []
        for _ in range(4):
            found.append(master.optimizer.param_groups[0]["lr"])
            master.step(master.parameters[0].square().sum())
        return found

    assert rates(4) == pytest.approx([0.4, 0.3, 0.2, 0.1]) and rates(None) == [0.4] * 4


def loaded(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def share_changed(model, before):
    pairs = [(one.detach().bfloat16(), before[name]) for name, one in model.named_parameters()]
    return sum((now != was).sum().item() for now, was in pairs) / sum(now.numel() for now, _ in pairs)


def test_bfloat16_trains_as_many_weights_as_float32_and_as_far(model_folder):
    """At the rate of real models AdamW on bfloat16 weights moves few of them; on copies in fp32 as many as there."""
    shares, losses = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = loaded(model_folder("llama"), dtype)
        windows = [(tokenizer(text)["input_ids"], 1) for text in TEXTS]
        special, before = torch.tensor(special_ids(tokenizer)), {}
        with torch.no_grad():
            for name, one in model.named_parameters():  # both from the same start, of the size of real models' weights
                one.copy_((one / 10).bfloat16())
                before[name] = one.detach().bfloat16().clone()
            start = training.text_nll(model, windows, tokenizer, special).mean.item()
        robustness.fine_tune(model, tokenizer, [windows], 40, 2e-5, 0)
        shares[dtype] = share_changed(model, before)
        with torch.no_grad():
            losses[dtype] = start - training.text_nll(model, windows, tokenizer, special).mean.item()
    assert shares[torch.bfloat16] == pytest.approx(shares[torch.float32], abs=0.02)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)


def test_copies_are_in_float32_and_the_model_stays_in_bfloat16(model_folder):
    model, tokenizer = loaded(model_folder("gemma2"), torch.bfloat16)
    master = Master(model.requires_grad_(True).parameters(), 1e-7)
    start = [one.detach().clone() for one in master.copies]
    for _ in range(3):
        ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
        master.step(training.nll(model, ids, torch.ones_like(ids, dtype=torch.bool)).mean)
    moved = [(one != was).float().mean().item() for one, was in zip(master.copies, start)]
    assert {one.dtype for one in master.copies} == {torch.float32} and min(moved[1:]) > 0.99  # all but unseen tokens
    assert all(torch.equal(one, copy.bfloat16()) for one, copy in zip(model.parameters(), master.copies))
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("dtype, size", [("float32", 16), ("bfloat16", 18)])
def test_room_is_counted_by_hand_and_refused(model_folder, monkeypatch, capsys, dtype, size):
    folder = str(model_folder("llama"))
    n = sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(folder).parameters())
    monkeypatch.setattr(memory, "free_bytes", lambda device: n * size)
    memory.check_room("npo", folder, "cpu", dtype)
    assert f"npo trains all {n / 1e6:,.1f} million weights" in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_bytes", lambda device: n * size - 1)
    with pytest.raises(UserError, match=r"GB are free\. rmu\.py and .* train few weights"):
        memory.check_room("npo", folder, "cpu", dtype)
    monkeypatch.setattr(memory, "free_bytes", lambda device: n * (size + 3))
    memory.check_room("undo", folder, "cpu", dtype, beside=3)
    with pytest.raises(UserError, match="other copies"):
        memory.check_room("undo", folder, "cpu", dtype, beside=4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_what_trains_few_weights_only_these_need_gradients(model_folder, monkeypatch, capsys, family):
    folder = str(model_folder(family))
    model = AutoModelForCausalLM.from_pretrained(folder)
    n, size = sum(one.numel() for one in model.parameters()), sum(map(torch.numel, with_lora(model, [0, 1], 0, r=4)[1]))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * n + 12 * size)
    rest = ("crisp", folder, "cpu", "float32", 0, lambda empty: lora_matrices(empty, [0, 1], 4))
    memory.check_room(*rest)
    assert f"crisp trains {size / 1e6:,.2f} of {n / 1e6:,.1f} million weights" in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * n + 12 * size - 1)
    with pytest.raises(UserError, match=r"are free\. the edits of baselines\.py train none"):
        memory.check_room(*rest)


@pytest.mark.parametrize("method", ["rmu", "crisp", "circuit-breakers"])
def test_what_trains_few_weights_says_so_before_it_scores(monkeypatch, tmp_path, method):
    model = load_hf("tiny")[0]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    if method == "rmu":
        n = sum(map(torch.numel, rmu.down_projections(model, rmu.SETTINGS["tiny"].layer).values()))
    else:  # ranks are the releases'
        layers, rank = (reach((3, 5, 7, 9)), 4) if method == "crisp" else (list(range(13)), 16)
        n = sum(map(torch.numel, with_lora(model, layers, 0, r=rank)[1]))
    with pytest.raises(UserError, match=rf"trains {n / 1e6:.2f} of 3\.5 million weights: .* 0\.00 GB are free"):
        (rmu if method == "rmu" else baselines).run(**({} if method == "rmu" else {"method": method}),
                                                    limit=4, out=str(tmp_path / "r.json"))  # fmt: skip


@pytest.mark.parametrize("loss_on", ["answer", "text"])
def test_of_a_question_only_the_answer_is_a_target_or_all_of_it(loss_on):
    s = settings(baselines.flags, {})
    benchmark, tokenizer = load_benchmark(s)[0], load_model("tiny").tokenizer
    forget, (wikitext, development) = training_windows(tokenizer, benchmark, s, loss_on)
    said = {tokenizer.decode(ids[start:]) for ids, start in development}
    if loss_on == "answer":
        assert said == {" A", " B", " C", " D"}
        letters, words = forget[: len(forget) // 2], forget[len(forget) // 2 :]
        assert {tokenizer.decode(ids[start:]) for ids, start in letters} == said
        questions, parts = benchmark["quizzes"]["wmdp_bio"]
        choices = [f" {questions[i]['choices'][questions[i]['answer']]}" for i in parts["_tuning"]]
        assert [tokenizer.decode(ids[start:]) for ids, start in words] == choices
    else:
        assert {start for _, start in forget + development} == {1}
    assert {start for _, start in wikitext} == {1}
    text = f"{'Once more. ' * QUESTION_TOKENS}Which?"
    ids, start = training.answer_window(tokenizer, text, "This one")
    assert len(ids) == QUESTION_TOKENS and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[start:]) == " This one" and tokenizer.decode(ids[:start]).endswith("Which?")


def test_a_forget_corpus_counts_whole(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "Blood carries oxygen. " * 40}) + "\n")
    s = settings(baselines.flags, dict(forget_corpus=str(tmp_path / "corpus.jsonl")))
    forget, (_, development) = training_windows(load_model("tiny").tokenizer, load_benchmark(s)[0], s, "answer")
    assert len(forget) > 1 and {start for _, start in forget} == {1}
    assert min(start for _, start in development) > 10


def test_crisp_distance_by_hand():
    was, now = torch.randn(2, 4, 3, 7, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ordinary = torch.rand(3, 7, generator=torch.Generator().manual_seed(5)) > 0.3
    expected = np.square((now - was).numpy() * ordinary.numpy()[..., None]).mean()
    assert training.distance(was, now, ordinary).item() == pytest.approx(expected, abs=1e-8)


def test_crisp_adapts_the_layers_of_the_release():
    assert training.reach(baselines.CRISP_LAYERS["gemma-2-2b-it"]) == list(range(3, 10))
    assert training.reach(baselines.CRISP_LAYERS["tiny"]) == [2, 3, 4, 5, 6]
    assert training.reach([0]) == [0] and training.reach([5]) == [4, 5]


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_crisp_adapts_attention_and_mlp_of_its_layers_only(model_folder, family):
    model, _ = hf(model_folder(family))
    names = training.linear_modules(model, [1, 2])
    blocks = decoder_layers(model)
    assert len(names) == 2 * sum(isinstance(m, (torch.nn.Linear, training.Conv1D)) for m in blocks[1].modules())
    assert all(".1." in name or ".2." in name for name in names)
