"""A model that is spread over two devices gives what it gives on one: loading, picking, ablating, scoring."""

import pytest
import torch
from conftest import some_ids
from two_devices import two_devices

import common
import evaluation
from data import UserError
from edits import NONE, ablation, patched, reconstruction
from evaluation import score_letters, score_loss
from show import top_tokens

FEATURES = [0, 3, 5, 9]
PARTS = {
    "gemma2": ("model.embed_tokens", "model.norm", "model.layers", ["model.rotary_emb", "lm_head"]),
    "qwen3": ("model.embed_tokens", "model.norm", "model.layers", ["model.rotary_emb"]),
    "gpt2": ("transformer.wte", "transformer.ln_f", "transformer.h", ["transformer.wpe", "lm_head"]),
}
LAST = {"qwen3": ["lm_head"]}


def spread(family: str) -> dict[str, str]:
    """Layers 0 and 1, with the embedding and what is tied to it, on one device, 2 and 3 on the other."""
    first, last, layers, more = PARTS[family]
    where = {name: "cpu:1" for name in (first, *more)} | {name: "cpu:2" for name in (last, *LAST.get(family, []))}
    return where | {f"{layers}.{number}": "cpu:1" if number < 2 else "cpu:2" for number in range(4)}


def test_the_pretence_is_strict():
    with two_devices():
        one, other = torch.ones(2, 2, device="cpu:1"), torch.ones(2, 2).to("cpu:2")
        assert str((one @ one).device) == "cpu:1" and torch.equal((one + 1).cpu(), 2 * torch.ones(2, 2))
        for mix in (lambda: one + other, lambda: one @ torch.ones(2, 2), lambda: one[other > 0]):
            with pytest.raises(RuntimeError, match="tensors on"):
                mix()
        assert one.index_add_(0, torch.tensor([0, 1], device="cpu:1"), 2 * one).cpu().sum() == 12


def everything(model, sae) -> dict:
    """What the lessons compute of a model, as numbers on the CPU."""
    windows = some_ids(model, (6, 20)).tolist()
    rates = common.firing_rates(model, sae, windows)
    rows = [NONE, patched(sae, FEATURES), reconstruction(sae), ablation(sae, FEATURES), ablation(sae, FEATURES, -30.0),
            ablation(sae, [2, 4], -30.0, "random-features"), ablation(sae, [3], -5.0)]  # fmt: skip
    prompts = [[2, *range(5, 17), 30 + i] for i in range(5)]  # twelve tokens in common: a stage of their own
    with common.ablate(model, sae, FEATURES, -30.0):
        logits = model(some_ids(model).to(model.cfg.device))
    return {
        "fires": rates.fires,
        "quality": evaluation.check_sae_quality(model, sae, windows, insist=False),
        "letters": score_letters(model, prompts, [5, 6, 7, 8], rows),
        "loss": score_loss(model, windows, rows)[0],
        "logits": logits.cpu(),
        "tokens": top_tokens(model, sae, FEATURES, windows),
    }


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("layer", [1, 2])
def test_a_model_on_two_devices_gives_what_it_gives_on_one(family, layer, get_model, model_folder, make_sae):
    model = get_model(family)
    sae = make_sae(model, layer=layer, hook_name=f"blocks.{layer}.hook_resid_post")
    folder = str(model_folder(family))
    wanted = everything(model, sae)
    with two_devices():
        apart = common.load_model(folder, device_map=spread(family))
        placed = {str(parameter.device) for parameter in apart.original_model.parameters()}
        assert placed == {"cpu:1", "cpu:2"} and str(apart.cfg.device) == "cpu:1"
        moved = common.load_sae(sae.source, layer, apart)
        assert str(moved.W_dec.device) == ("cpu:1" if layer < 2 else "cpu:2")
        found = everything(apart, moved)
    assert torch.equal(found["fires"], wanted["fires"])
    assert found["quality"] == wanted["quality"] and found["tokens"] == wanted["tokens"]
    for name in ("letters", "loss", "logits"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)


def test_an_automatic_device_map_needs_neither_a_device_nor_a_gpu(model_folder):
    folder = str(model_folder("gemma2"))
    assert common.load_model(folder, device_map="auto").cfg.device
    with pytest.raises(UserError, match="device_map spreads"):
        common.load_model(folder, "cpu", device_map="auto")
