"""RMU: its loss by hand, the matrices it trains, and what it leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, FAMILIES, LAYERS, some_ids
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import edits
import rmu
from data import UserError, padded
from edits import decoder_layers, watch_tokens

ROOT = Path(__file__).resolve().parent.parent
MATRIX = {
    "gpt2": "mlp.c_proj.weight",
    "gpt_neox": "mlp.dense_4h_to_h.weight",
    **dict.fromkeys(("gemma2", "gemma3", "llama", "qwen3"), "mlp.down_proj.weight"),
}


def hf(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def outputs_of_layer(model, ids, layer):
    """The layer's output in a whole forward pass, without anything of rmu.py."""
    kept = []
    handle = decoder_layers(model)[layer].register_forward_hook(
        lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    model(ids)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_in_float64_by_hand(model_folder, get_model, family):
    model, tokenizer = hf(model_folder(family), torch.float64)
    forget, retain = some_ids(get_model(family)), some_ids(get_model(family), seed=1)
    layer, multiple, alpha = 2, 3.0, 7.0
    matrices = rmu.down_projections(model, layer)
    originals = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    model.requires_grad_(False)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        frozen_f, frozen_r = (outputs_of_layer(model, ids, layer).numpy() for ids in (forget, retain))
        for matrix in matrices.values():
            matrix += 0.1 * torch.randn(matrix.shape, generator=noise, dtype=torch.float64)
        moved_f, moved_r = (outputs_of_layer(model, ids, layer).numpy() for ids in (forget, retain))
    with watch_tokens(model, tokenizer) as seen, torch.no_grad():
        model(forget)
        mask_f = seen["ordinary"]
        model(retain)
        mask_r = seen["ordinary"]
        with rmu.as_they_were(matrices, originals):
            norms, back = (edits.hidden(model, ids, layer) for ids in (forget, retain))
            norms = norms.norm(dim=-1, keepdim=True)
    assert torch.equal(back, torch.from_numpy(frozen_r))  # the matrices' own values are in place there
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    u = rmu.control_vector(32, 0, "cpu").double()
    coefficient = multiple * norms[mask_f].mean()
    h_f, h_r = (edits.hidden(model, ids, layer) for ids in (forget, retain))
    found = rmu.rmu_loss(h_f, (coefficient * u).expand_as(h_f), h_r, back, mask_f, mask_r, alpha)

    real_f, real_r = mask_f.numpy(), mask_r.numpy()
    scale = multiple * np.sqrt((frozen_f[real_f] ** 2).sum(-1)).mean()
    away = ((moved_f[real_f] - scale * u.numpy()) ** 2).mean()
    held = alpha * ((moved_r[real_r] - frozen_r[real_r]) ** 2).mean()
    assert [x.item() for x in found] == pytest.approx([away, held], abs=1e-8, rel=1e-8)

    with rmu.as_they_were(matrices, originals):
        edits.hidden(model, retain, layer)  # between forward and backward, as train may have it
    (found[0] + found[1]).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(with_gradient) == 3 and all(name.endswith(MATRIX[family]) for name in with_gradient)
    swapped = {name: matrix.grad.clone() for name, matrix in matrices.items()}
    model.zero_grad()
    h_f, h_r = (edits.hidden(model, ids, layer) for ids in (forget, retain))
    sum(rmu.rmu_loss(h_f, (coefficient * u).expand_as(h_f), h_r, back, mask_f, mask_r, alpha)).backward()
    assert all(torch.equal(matrix.grad, swapped[name]) for name, matrix in matrices.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_are_named_and_the_right_ones(model_folder, family):
    model, _ = hf(model_folder(family))
    found = rmu.down_projections(model, 3)
    assert list(found) == [f"layer {number} {MATRIX[family]}" for number in (1, 2, 3)]
    for number, matrix in zip((1, 2, 3), found.values()):
        assert matrix is dict(decoder_layers(model)[number].named_parameters())[MATRIX[family]]
        assert 64 in matrix.shape or 4 * 32 in matrix.shape  # the wide side of the MLP
    assert list(rmu.down_projections(model, 0)) == [f"layer 0 {MATRIX[family]}"]


def test_an_unknown_family_is_refused_by_name():
    config = OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=50,
                       word_embed_proj_dim=16, max_position_embeddings=32)  # fmt: skip
    with pytest.raises(UserError, match="OPTForCausalLM"):
        rmu.down_projections(OPTForCausalLM(config), 2)


@pytest.mark.parametrize("adaptive", [False, True])
def test_training_by_hand_and_retain_sets_in_turn(model_folder, monkeypatch, adaptive):
    """The first step's losses in float64: a coefficient from the first batch's mean norm, or each token's own norm."""
    model, tokenizer = hf(model_folder("llama"), torch.float64)
    texts = ["The cat sat on the mat.", "Rivers of Europe flow.", "Blood carries oxygen to the heart.", "Answer: A"]
    windows = [tokenizer(text)["input_ids"] for text in texts]
    forget, sets, drawn, passes = windows[:1], [windows[1:2], windows[2:3]], [], []
    monkeypatch.setattr(rmu, "padded", lambda rows, *rest: drawn.append(rows) or padded(rows, *rest))
    monkeypatch.setattr(rmu, "hidden", lambda *args: passes.append(1) or edits.hidden(*args))
    with torch.no_grad():
        h = outputs_of_layer(model, torch.tensor(forget), 2)[0, 1:].numpy()  # without BOS
    setting = rmu.Setting(layer=2, multiple=3.0, alpha=7.0, steps=4, lr=1e-3)
    log, u, coefficient, _ = rmu.train(model, tokenizer, forget, sets, setting, adaptive, 0)
    norms = np.sqrt((h**2).sum(-1, keepdims=True))
    target = 3.0 * (norms if adaptive else norms.mean()) * u.double().numpy()
    assert coefficient == pytest.approx(3.0 * norms.mean(), abs=1e-8)
    assert log[0][:2] == pytest.approx([((h - target) ** 2).mean(), 0.0], abs=1e-8)
    assert drawn == [forget, sets[0], forget, sets[1]] * 2
    assert len(passes) == (4 * 4 if adaptive else 4 * 3 + 1)  # norms before training: of each batch, or of the first


def test_later_layers_are_not_run(model_folder, get_model):
    model, _ = hf(model_folder("llama"))
    ids, ran = some_ids(get_model("llama")), []
    for number, block in enumerate(decoder_layers(model)):
        block.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))
    h = edits.hidden(model, ids, 1)
    assert ran == [0, 1] and torch.equal(h, outputs_of_layer(model, ids, 1))


def test_the_control_vector_is_seeded_positive_and_of_length_1():
    u = rmu.control_vector(500, 3, "cpu")
    assert torch.equal(u, rmu.control_vector(500, 3, "cpu")) and not torch.equal(u, rmu.control_vector(500, 4, "cpu"))
    assert u.min() >= 0 and u.norm().item() == pytest.approx(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training of tiny: its record, and the folder that it was written to."""
    folder = tmp_path_factory.mktemp("rmu")
    return rmu.run(steps=40, limit=30, out=str(folder / "r.json")), folder


def test_the_record_has_everything_and_the_folder_three_other_matrices(trained):
    record, folder = trained
    assert json.loads((folder / "r.json").read_text())["points"] == record["points"]
    assert [point["method"] for point in record["points"]] == ["none", "rmu"]
    assert {"wmdp_bio", "wmdp_bio_tuning", "mmlu", "mmlu_tuning", "openwebtext"} == set(record["points"][1]["scores"])
    assert len(record["log"]) == 40 and record["log"][-1][2] > record["log"][0][2] + 0.1  # turns to the control vector
    assert len(record["control_vector"]) == CONFIG["hidden_size"]
    before, after = (load_file(path / "model.safetensors") for path in (ROOT / "tiny/model", folder / "r.model"))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (5, 6, 7)}
    assert {path.name for path in folder.iterdir()} == {"r.json", "r.model", "r_losses.png"}


@pytest.mark.slow
def test_the_same_seed_trains_the_same_weights_and_another_does_not(trained, tmp_path):
    _, folder = trained
    for seed, equal in ((0, True), (1, False)):
        rmu.run(steps=40, limit=2, seed=seed, out=str(tmp_path / "again.json"))
        files = [load_file(path / "model.safetensors") for path in (folder / "r.model", tmp_path / "again.model")]
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0]) == equal


@pytest.mark.slow
def test_adaptive_pushes_each_token_by_its_own_norm(trained, tmp_path):
    fixed, _ = trained
    adaptive = rmu.run(steps=40, limit=2, adaptive=True, out=str(tmp_path / "a.json"))
    assert adaptive["points"][1]["method"] == "adaptive-rmu"
    assert adaptive["log"][0][0] != fixed["log"][0][0] and adaptive["log"][-1][2] > adaptive["log"][0][2] + 0.1


def test_the_saved_folder_gives_the_same_letters_through_lm_eval(trained):
    record, folder = trained
    lm = HFLM(str(folder / "r.model"), device="cpu", dtype="float32", batch_size=16, attn_implementation="eager")
    manager = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)
    for name in ("wmdp_bio", "mmlu"):
        asked = record["data"][name]["questions"]
        results = simple_evaluate(lm, tasks=[f"tiny_{name}"], samples={f"tiny_{name}": asked}, task_manager=manager)
        rows = sorted(results["samples"][f"tiny_{name}"], key=lambda row: row["doc_id"])
        letters = ["ABCD"[int(np.argmax([value for value, _ in row["filtered_resps"]]))] for row in rows]
        assert "".join(letters) == record["points"][1]["scores"][name]["letters"]


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_ends_with_the_same_record(monkeypatch, tmp_path):
    monkeypatch.setattr(rmu, "MULTIPLES", (2.0, 4.0))
    monkeypatch.setattr(rmu, "ALPHAS", (10.0,))
    flags = dict(sweep=True, steps=3, limit=6)
    whole = rmu.run(**flags, out=str(tmp_path / "whole.json"))
    assert [point["setting"]["multiple"] for point in whole["points"][1:]] == [2.0, 4.0]

    train, calls = rmu.train, []

    def stop_at_the_second(*args):
        calls.append(args[4].multiple)
        if calls == [2.0, 4.0]:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(rmu, "train", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt, match="1 finished pieces are kept"):
        rmu.run(**flags, out=str(tmp_path / "r.json"))
    assert {path.name for path in tmp_path.glob("r*")} == {"r.pieces"}
    again = rmu.run(**flags, out=str(tmp_path / "r.json"))
    assert calls[2:3] == [4.0] and len(calls) == 4  # the second setting, and the chosen one for its folder
    assert json.dumps(again["points"]) == json.dumps(whole["points"])  # as text NaN is equal
    assert again["log"] == whole["log"]
    assert {path.name for path in tmp_path.glob("r*")} == {"r.json", "r.model", "r_losses.png"}


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(layer=40), LAYERS),
        (dict(multiple=1e30), "the loss is no number"),
        (dict(model="no-such-model"), "no-such-model"),
        (dict(limit=0), "--limit 0: at least 1"),
    ],
)
def test_mistakes_are_named(tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        rmu.run(**{"steps": 2, "limit": 2, **flags}, out=str(tmp_path / "r.json"))
    assert not list(tmp_path.iterdir())
