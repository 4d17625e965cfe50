"""Batches, the optimiser in fp32 under a model in bfloat16, and whether training fits the memory."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import robustness
import training
from data import UserError, special_ids
from training import Master

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
    monkeypatch.setattr(training, "free_bytes", lambda device: n * size)
    training.check_room("npo", folder, "cpu", dtype)
    assert f"npo trains all {n / 1e6:,.1f} million weights" in capsys.readouterr().out
    monkeypatch.setattr(training, "free_bytes", lambda device: n * size - 1)
    with pytest.raises(UserError, match=r"GB are free\. rmu\.py and .* train few weights"):
        training.check_room("npo", folder, "cpu", dtype)
