"""Attacks: the push of the residual stream that an edit cannot see, and weights rounded to few bits."""

import numpy as np
import pytest
import torch

from attacks import LastToken, aligned, directions, margin, other_option, pushed, round_weights
from common import load_hf
from edits import NONE, applied, decoder_layers, edit_of, watch_tokens

TEXTS = ["Which rock floats? A. pumice B. slate Answer:", "What is the capital of France? Answer:", "Where? Answer:"]
LETTERS = torch.tensor([[11], [12], [13], [14]])


@pytest.fixture(params=["gemma2", "gpt2", "llama"])
def attacked(request, model_folder, make_sae, get_model):
    """A Hugging Face model, its tokenizer, prompts of different lengths, and an edit of each kind."""
    model, tokenizer = load_hf(str(model_folder(request.param)))
    sae = make_sae(get_model(request.param))
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1)).tolist()
    edits = {
        "none": NONE,
        "clamp": edit_of("clamp", sae, features=list(range(12)), clamp=-5.0),
        "dsg": edit_of("dsg", sae, features=list(range(12)), clamp=-5.0, gate=0.0),
        "diff-in-means": edit_of("diff-in-means", None, None, [1, 2], direction=direction),
    }
    return model, tokenizer, rows, edits


@pytest.mark.parametrize("kind", ["none", "clamp", "dsg", "diff-in-means"])
def test_the_last_token_alone_is_the_whole_prompt_with_the_edit_on(attacked, kind):
    """With a push or without, each prompt by itself and unpadded, all layers run, the push added behind the edit."""
    model, tokenizer, rows, edits = attacked
    edit, push = edits[kind], 0.3 * torch.randn(len(rows), model.config.hidden_size)
    last = LastToken(model, tokenizer, edit, rows, 1)
    for given in (torch.zeros_like(push), push):
        found = last(last.h + given)
        for number, row in enumerate(rows):

            def add(module, args, output, number=number, given=given):
                h = output[0] if isinstance(output, tuple) else output
                h = torch.cat([h[:, :-1], h[:, -1:] + given[number]], 1)
                return (h, *output[1:]) if isinstance(output, tuple) else h

            with torch.no_grad(), applied(model, tokenizer, edit):
                handle = decoder_layers(model)[1].register_forward_hook(add)
                wanted = model(torch.tensor([row])).logits[0, -1]
                handle.remove()
            torch.testing.assert_close(found[number], wanted, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(last(last.h), last(last.h + push), atol=1e-3)


def test_a_push_is_bounded_unseen_by_the_edit_and_all_that_is_trained(attacked):
    model, tokenizer, rows, edits = attacked
    edit, wanted = edits["clamp"], torch.tensor([2, 0, 3])
    last = LastToken(model, tokenizer, edit, rows, 1)
    basis, latents = directions(edit, 1), edit.at[1].latents
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = margin(last(last.h)[:, LETTERS].amax(-1), wanted)
    answered, push = pushed(last, LETTERS, wanted, 0.5, basis, steps=40)
    assert (push.norm(dim=1) <= 0.5 * last.h.norm(dim=1) * (1 + 1e-5)).all() and (push.norm(dim=1) > 0).all()
    torch.testing.assert_close(push @ latents.W_enc, torch.zeros(len(rows), 12), atol=1e-4, rtol=0)
    end = last(last.h + push)[:, LETTERS].amax(-1)
    assert (margin(end, wanted) > start).all() and answered.tolist() == end.argmax(-1).tolist()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in latents.sae.parameters())


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "topk"])
def test_what_an_edit_looks_at_are_its_features_encoder_columns(gemma, make_sae, kind):
    sae = make_sae(gemma, kind)
    basis = directions(edit_of("clamp", sae, features=[4, 9, 2], clamp=-1.0), 1)
    columns = sae.W_enc[:, [4, 9, 2]].double()
    assert basis.shape == (sae.cfg.d_in, 3) and directions(NONE, 1) is None
    torch.testing.assert_close(basis @ basis.T @ columns, columns, atol=1e-10, rtol=0)


def test_the_margin_by_hand_and_one_step_of_adam(monkeypatch):
    """In fp64: loss, gradient, projection and bound, with a linear model in place of the later layers."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(6, 9, generator=generator, dtype=torch.float64)

    class Linear:
        h = torch.randn(2, 6, generator=generator, dtype=torch.float64)

        def __call__(self, h):
            return h @ head

    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # fp32 where the model runs, fp64 here
    letters, wanted = torch.tensor([[1], [3], [5], [7]]), torch.tensor([2, 0])
    logits = (Linear.h @ head)[:, [1, 3, 5, 7]]
    by_hand = torch.stack([logits[0, 2] - logits[0, [0, 1, 3]].mean(), logits[1, 0] - logits[1, [1, 2, 3]].mean()])
    torch.testing.assert_close(margin(logits, wanted), by_hand, atol=1e-12, rtol=0)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64))[0]
    _, found = pushed(Linear(), letters, wanted, 0.3, basis, steps=1)
    own, others = head[:, [5, 1]].T, torch.stack([head[:, [1, 3, 7]].mean(1), head[:, [3, 5, 7]].mean(1)])
    unit = 0.192 / 6**0.5 * torch.sign(own - others)  # Adam's first step goes by the sign alone
    unit = unit - unit @ basis @ basis.T
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(found, 0.3 * Linear.h.norm(dim=1, keepdim=True) * unit, atol=1e-7, rtol=0)


def test_padding_in_front_changes_no_mask_or_position(attacked):
    model, tokenizer, rows, _ = attacked
    whole = aligned(rows, tokenizer, "cpu")
    for row, ids, mask, places in zip(rows, *whole.values()):
        assert ids[mask.bool()].tolist() == row and places[mask.bool()].tolist() == list(range(len(row)))
    with torch.no_grad(), watch_tokens(model, tokenizer) as seen:
        model(**whole)
    assert not seen["ordinary"][whole["attention_mask"] == 0].any()


def test_the_controls_target_is_neither_right_nor_what_is_said():
    right, now = [0, 1, 2, 3] * 50, [1, 1, 3, 0] * 50
    found = other_option(right, now, 0)
    assert all(k not in pair for k, *pair in zip(found, right, now)) and set(found) == {0, 1, 2, 3}
    assert other_option(right, now, 0) == found != other_option(right, now, 1)


@pytest.mark.parametrize("family, bits", [("gemma2", 4), ("gpt2", 8)])
def test_weights_are_rounded_by_row(model_folder, family, bits):
    model, _ = load_hf(str(model_folder(family)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    round_weights(model, bits)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and not any("norm" in name or "embed" in name or "wte" in name or "ln" in name for name in changed)
    name = changed[0]
    was, now = ((x[name].T if family == "gpt2" else x[name]).double() for x in (before, model.state_dict()))
    for row, new in zip(was.numpy(), now.numpy()):
        step = np.abs(row).max() / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(new, step * np.round(row / step), atol=1e-6)
        assert len(np.unique(np.round(new / step))) <= 2**bits - 1
    again = {name: value.clone() for name, value in model.state_dict().items()}
    round_weights(model, bits)
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in model.state_dict().items())
