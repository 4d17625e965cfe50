"""Many edits in one pass: for each the same as a run of its own."""

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import BOS, D_SAE, EOS, FAMILIES, MARKER, PAD, WINDOW, some_ids

import common
import data
import edits
import engine
import evaluation
from data import UserError, encode_prompts, prompt
from edits import METHODS, NONE, Edit, ablation, applied, make, patched, reconstruction
from engine import OnePass
from evaluation import score_letters, score_loss

FIRST, SECOND = tuple(range(0, 40, 2)), tuple(range(20, D_SAE, 3))
DEAD = (1, 3, 5)


def row(name: str, sae, features, clamp=0.0) -> Edit:
    return replace(ablation(sae, list(features), clamp), method=name)


def ablations(sae) -> list[Edit]:
    return [
        NONE,
        row("patched", sae, ()),
        row("first", sae, FIRST),
        row("second", sae, SECOND),
        row("one", sae, (8,)),
        row("first again", sae, FIRST[::-1]),
        row("first and dead ones", sae, FIRST + DEAD),
        row("negative", sae, FIRST, -2.0),
        row("more negative", sae, SECOND, -7.0),
        row("dead", sae, DEAD, -5.0),
        reconstruction(sae),
    ]


def dead(sae):
    sae.threshold[list(DEAD)] = 1e9


@pytest.fixture(scope="session")
def sae(model, make_sae):
    return make_sae(model, spoil=dead)


def rows_of_ids(model):
    """Prompts of 3 to 30 tokens, shorter and longer than the sliding window, with special tokens inside."""
    rows = [row[: 3 + 3 * k] for k, row in enumerate(some_ids(model, (10, 30), seed=5)[:, :30].tolist())]
    assert min(map(len, rows)) < WINDOW < max(map(len, rows)) and rows[3][9] != 0
    return [rows[k] for k in (4, 9, 0, 7, 2, 1, 8, 3, 6, 5)]


def special(model):
    return torch.tensor([model.tokenizer.convert_tokens_to_ids(token) for token in (BOS, EOS, PAD, MARKER)])


def plain_each_edit(model, rows, edits, score, shape=(), **ignored):
    """What engine.each_edit is to give: a plain pass for every row and edit, one at a time."""
    out, kept = torch.zeros(len(edits), len(rows), *shape, dtype=torch.float64), {}
    handle = model.unembed.register_forward_pre_hook(lambda module, args: kept.update(h=args[0]))
    for (k, edit), (i, ids) in itertools.product(enumerate(edits), enumerate(rows)):
        with torch.inference_mode(), applied(model, model.tokenizer, edit):
            model(torch.tensor([ids]))
        out[k, i] = score([i], 0, kept["h"])[0]
    handle.remove()
    return out


@pytest.fixture
def plainly(monkeypatch):
    """function -> what it gives where evaluation uses plain_each_edit."""

    def run(function, *args, **more):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "each_edit", plain_each_edit)
            return function(*args, **more)

    return run


def planned(model, edits, ids) -> OnePass:
    """A run with `copies`, and `rows` (n_edits, batch): the number of each edit's prompt or copy, prompts first."""
    run = OnePass(model, edits)
    run.run(ids)
    run.copies = list(itertools.chain(*run.plan()))
    run.rows = torch.arange(len(ids)).repeat(len(edits), 1)
    for i, copy in enumerate(run.copies):
        run.rows[copy.used_by, copy.prompt] = len(ids) + i
    return run


def stack(model, edits, ids):
    """What leaves the final norm for every prompt and copy, (n_rows, pos, d_model), and the run."""
    result, run = OnePass(model, edits).run(ids), planned(model, edits, ids)
    kept = torch.cat([result, result[[copy.prompt for copy in run.copies]]])
    for i, copy in enumerate(run.copies):
        start, h = run.run_copies([copy])
        kept[len(ids) + i, start:] = h[0]
    return kept, run


# ------------------------------------------------------------------------------- many edits, one pass


def test_letters_in_one_pass_equal_one_run_per_ablation(model, sae, plainly):
    prompts = rows_of_ids(model)
    _, letters = encode_prompts(model.tokenizer, ["Answer:"])
    wanted = plainly(score_letters, model, prompts, letters, ablations(sae))
    found = score_letters(model, prompts, letters, ablations(sae))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    moved = (found - found[0]).abs().amax((1, 2))
    assert all((m > 0.1) == (a.method not in ("none", "patched", "dead")) for m, a in zip(moved, ablations(sae)))
    single = score_letters(model, prompts, letters, ablations(sae), batch_size=1)
    torch.testing.assert_close(single, found, atol=1e-5, rtol=0)
    assert torch.equal(single.argmax(-1), found.argmax(-1))


def test_loss_in_one_pass_equals_one_run_per_ablation(model, sae, plainly):
    windows = rows_of_ids(model)
    wanted, _ = plainly(score_loss, model, windows, ablations(sae))
    nats, targets = score_loss(model, windows, ablations(sae))
    assert targets.tolist() == [int((~torch.isin(torch.tensor(row[1:]), special(model))).sum()) for row in windows]
    torch.testing.assert_close(nats / targets, wanted / targets, atol=1e-5, rtol=0)
    for options in (dict(batch_size=1), dict(batch_size=4, chunk=1), dict(chunk=5000)):
        again, same = score_loss(model, windows, ablations(sae), **options)
        assert torch.equal(same, targets)
        torch.testing.assert_close(again / targets, nats / targets, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [9, pytest.param(13, marks=pytest.mark.slow)])
def test_what_all_prompts_begin_with_is_run_once(model, sae, shared, monkeypatch, plainly):
    """Longer than the sliding window, with special tokens and edited ones inside."""
    rows = [row[: 15 + 2 * k] for k, row in enumerate(some_ids(model, (8, 30), seed=5).tolist())]
    other = some_ids(model, (1, 30), seed=6)[0].tolist()  # the last batch begins otherwise
    prompts = [[*(rows[0] if k > 2 else other)[:shared], *row[shared:]] for k, row in enumerate(rows)]
    sizes = []
    engine.check_engine(model, [1])
    monkeypatch.setattr(engine, "PASS_TOKENS", 7 * 29)
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[:2])))
    found = score_letters(model, prompts, [20, 21, 22, 23], ablations(sae), batch_size=5)
    nats, targets = score_loss(model, prompts, ablations(sae), batch_size=5)
    handle.remove()
    assert sizes == [(1, shared), (5, 29 - shared), (1, shared), (3, 19 - shared)] * 2
    wanted = plainly(score_letters, model, prompts, [20, 21, 22, 23], ablations(sae))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    losses, _ = plainly(score_loss, model, prompts, ablations(sae))
    torch.testing.assert_close(nats / targets, losses / targets, atol=1e-5, rtol=0)
    sizes.clear()
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[:2])))
    score_letters(model, prompts[3:], [20, 21, 22, 23], ablations(sae), batch_size=2)
    handle.remove()
    assert sizes[0] == (1, shared) and len(sizes) == 4  # the second batch begins as the first, the last is one prompt
    run = planned(model, ablations(sae), torch.tensor([prompt[:15] for prompt in prompts[3:]]))
    starts = {copy.start for copy in run.copies}
    assert min(starts) < shared  # some edits begin within what is shared


@pytest.mark.parametrize("kind", ["standard", "gated", "topk", "topk_rescaled", "batchtopk"])
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
def test_one_pass_for_every_kind_of_sae(gemma, make_sae, kind, norm, plainly):
    sae, prompts = make_sae(gemma, kind, norm, b_dec=True), rows_of_ids(gemma)
    wanted = plainly(score_letters, gemma, prompts, [20, 21, 22, 23], ablations(sae))
    found = score_letters(gemma, prompts, [20, 21, 22, 23], ablations(sae))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_unablated_row_equals_the_clean_model_in_bfloat16(half_model, make_sae):
    sae, ids = make_sae(half_model, spoil=dead), some_ids(half_model)
    clean = half_model(ids)
    kept, run = stack(half_model, ablations(sae), ids)
    assert kept.dtype == torch.bfloat16 and len(kept) > len(ids)
    with torch.inference_mode():
        for name in ("none", "patched", "dead"):
            own = run.rows[[a.method for a in ablations(sae)].index(name)]
            assert torch.equal(engine.head(half_model, kept[own]), clean.float())


def test_bfloat16_scores_are_those_of_one_run_per_ablation(half_model, make_sae, plainly):
    sae, prompts = make_sae(half_model, spoil=dead), rows_of_ids(half_model)
    wanted = plainly(score_letters, half_model, prompts, [20, 21, 22, 23], ablations(sae))
    found = score_letters(half_model, prompts, [20, 21, 22, 23], ablations(sae), batch_size=1)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    # the edits are summed in another order, so the last of bfloat16's eight bits may differ
    torch.testing.assert_close(found, wanted, atol=0.2, rtol=0)
    assert (found - wanted).abs().mean() < 0.02


def test_ablations_that_change_nothing_cost_no_row(model, sae):
    ids = some_ids(model)
    kept, run = stack(model, [NONE, row("dead", sae, DEAD, -5.0), row("patched", sae, ())], ids)
    assert run.copies == [] and len(kept) == len(ids)
    assert run.rows.tolist() == [list(range(len(ids)))] * 3


def test_equal_edits_share_a_row(model, sae):
    ids = some_ids(model)
    _, run = stack(model, ablations(sae), ids)
    rows = dict(zip([a.method for a in ablations(sae)], run.rows.tolist()))
    assert rows["first"] == rows["first again"] == rows["first and dead ones"]
    assert rows["none"] == rows["patched"] == rows["dead"] == list(range(len(ids)))
    different = [rows[name] for name in ("none", "first", "second", "negative", "more negative", "sae-reconstruction")]
    assert len(set(itertools.chain(*different))) == 6 * len(ids)
    source = [*range(len(ids)), *(copy.prompt for copy in run.copies)]
    assert all(source[row] == b for method in rows.values() for b, row in enumerate(method))
    assert len(source) == len(set(itertools.chain(*rows.values())))


def test_the_row_that_must_change_nothing_goes_all_the_way_of_an_edit(model, sae):
    """All picked features set to what they are: copies of its own, the residual stream to the bit, the same letters."""
    rows = [NONE, patched(sae, list(FIRST)), row("clamp", sae, FIRST, -5.0), row("random", sae, SECOND, -5.0)]
    kept, run = stack(model, rows, some_ids(model))
    batch = len(run.editable)
    copied = [k for k, place in enumerate(run.rows[1].tolist()) if place >= batch]
    assert copied == list(range(batch)) and rows[1].method == "sae-patched"
    for copy in [run.copies[place - batch] for place in run.rows[1].tolist()]:
        h = run.streams[1][[copy.prompt]]
        assert torch.equal(run.changed[1, rows[1].at[1]](h, [copy.prompt]), h)
    torch.testing.assert_close(kept[run.rows[1]], kept[run.rows[0]], atol=2e-5, rtol=2e-5)


def test_a_prompt_without_the_feature_costs_no_row(gemma, make_sae):
    sae, ids = make_sae(gemma, spoil=dead), some_ids(gemma)[:, :10]
    ids[2] = 0
    _, run = stack(gemma, [NONE, row("first", sae, FIRST)], ids)
    assert run.rows[1].tolist() == [4, 5, 2, 6] and [copy.prompt for copy in run.copies] == [0, 1, 3]


def test_reconstruction_leaves_special_tokens_alone(gemma, make_sae):
    sae, ids = make_sae(gemma, "standard"), torch.tensor([[2, 1, 0, 2]])
    kept, run = stack(gemma, [NONE, reconstruction(sae)], ids)
    torch.testing.assert_close(kept[run.rows[0, 0]], kept[run.rows[1, 0]], atol=1e-5, rtol=1e-5)


def test_one_forward_pass_per_batch(gemma, make_sae):
    edits, passes = ablations(make_sae(gemma)), []
    engine.check_engine(gemma, [1])  # its passes, which come once a model, are not meant, nor are those for an SAE
    handle = gemma.blocks[0].register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    score_letters(gemma, rows_of_ids(gemma), [20, 21, 22, 23], edits, batch_size=4)
    handle.remove()
    assert passes == [4, 4, 2]


def test_hooks_are_gone_after_scoring_and_after_an_exception(model, sae):
    ids = some_ids(model)
    clean = model(ids)
    score_letters(model, rows_of_ids(model), [20, 21, 22, 23], ablations(sae))
    assert torch.equal(model(ids), clean)
    with pytest.raises(IndexError):
        OnePass(model, ablations(sae)).run(ids + 10**6)
    assert torch.equal(model(ids), clean)


def test_a_layer_that_is_not_there_raises(gemma):
    with pytest.raises(RuntimeError, match=r"layers \[9\] never ran"):
        OnePass(gemma, [Edit("a", at={9: lambda h, mask: -h})]).run(torch.tensor([[2, 30, 31]]))


def test_sae_at_the_last_layer(model, make_sae, plainly):
    sae = make_sae(model, layer=3, hook_name="blocks.3.hook_resid_post")
    prompts, rows = rows_of_ids(model), [NONE, row("first", sae, FIRST, -1.0)]
    found = score_letters(model, prompts, [20, 21, 22, 23], rows)
    wanted = plainly(score_letters, model, prompts, [20, 21, 22, 23], rows)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_gates_share_of_tokens_does_not_depend_on_padding(gemma, make_sae):
    """With chat markers edited and counted too: DSG gives a prompt the same letters alone and among longer ones."""
    sae, prompts, found = make_sae(gemma, spoil=dead), rows_of_ids(gemma), {}
    gemma.tokenizer.edit_special = "all-but-bos"
    try:
        for size in (1, 10):
            gates = (0.2, 0.3, 0.4, 0.5)
            rows = [make("dsg", sae, features=[0, 2], clamp=-4.0, gate=gate) for gate in gates]
            found[size] = score_letters(gemma, prompts, [20, 21, 22, 23], rows, batch_size=size)
    finally:
        gemma.tokenizer.edit_special = "never"
    assert (found[1] - found[1][0]).abs().max() > 0.1  # the gates part the prompts
    torch.testing.assert_close(found[10], found[1], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------ every method, several layers


def gate_between(model, sae, features, prompts) -> float:
    """Passed by about half of the prompts."""
    layer, shares = edits.layer_of(sae), []
    with edits.token_mask(model.original_model, model.tokenizer) as mask:
        for ids in prompts:
            h = edits.residual_stream(model.original_model, torch.tensor([ids]), layer)
            shares.append(edits.gate_of(edits.Latents(sae, features).encode(h)[0], mask.counted).item())
    shares = sorted(shares)
    widest = max(range(1, len(shares) - 1), key=lambda k: shares[k + 1] - shares[k])
    return (shares[widest] + shares[widest + 1]) / 2


def every_method(low, high, gates) -> list[Edit]:
    """Every method at the layer of `low`, some at that of `high` and at both."""
    features, direction = list(FIRST), torch.linspace(-1, 2, low.cfg.d_in).tolist()
    arguments = {
        "sae-patched": dict(features=features),
        "sae-reconstruction": {},
        "random-features": dict(features=list(SECOND), clamp=-2.0),
        "measured-clamp": dict(features=list(SECOND), clamp=2.0),
        "zero-ablation": dict(features=list(SECOND)),
        "clamp": dict(features=features, clamp=-3.0),
        "conditional-clamp": dict(features=features, clamp=-3.0, threshold=0.5 * low.scale),
        "refusal-clamp": dict(features=features, threshold=0.5 * low.scale, refusal=7, refusal_value=-4.0),
        "mean-ablation": dict(features=features, means=[0.3] * len(features)),
        "dsg": dict(features=[0, 2], clamp=-4.0, gate=gates[0]),
        "diff-in-means": dict(direction=direction, strength=1.5),
    }
    assert set(arguments) == set(METHODS)
    at_low = [make(method, low, **some) for method, some in arguments.items()]
    at_high = [make(method, high, **arguments[method]) for method in ("clamp", "mean-ablation")]
    at_high.append(make("dsg", high, **arguments["dsg"] | {"gate": gates[1]}))
    both = [make("diff-in-means", None, layers=[1, 2, 3], **arguments["diff-in-means"])]
    for method in ("clamp", "dsg"):
        parts = [make(method, sae, **arguments[method]) for sae in (low, high)]
        both.append(Edit(method, at=parts[0].at | parts[1].at))
    zeroed = Edit("zeroed", at={2: lambda h, mask: torch.where(mask[..., None], 0.0, h)})
    return [NONE, *at_low, *at_high, *both, zeroed, Edit("both zeroed", at={1: zeroed.at[2], 3: zeroed.at[2]})]


def plain_pass(model, edit: Edit, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (pos, d_vocab) of one unpadded prompt from the Hugging Face model alone."""
    hf = model.original_model
    with torch.inference_mode(), applied(hf, model.tokenizer, edit):
        return hf(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("header", [0, 9, 17])
def test_every_method_in_one_pass_equals_a_plain_pass(model, make_sae, scale_of, header, monkeypatch):
    """Two layers and both in one list, right-padded mixed lengths beyond the sliding window of 8, a shared header that
    is longer and shorter than it, and more rows than fit at once."""
    low, high = make_sae(model, spoil=dead), make_sae(model, layer=2, hook_name="blocks.2.hook_resid_post", seed=1)
    low.scale = scale_of(model)
    texts = some_ids(model, (7, 30), seed=5).tolist()
    prompts = [[*texts[0][:header], *ids[header : 20 + 2 * k - header // 9]] for k, ids in enumerate(texts)]
    rows = every_method(low, high, [gate_between(model, sae, [0, 2], prompts) for sae in (low, high)])
    wanted = [[plain_pass(model, edit, ids) for ids in prompts] for edit in rows]
    letters = [20, 21, 22, 23]
    last = torch.stack([torch.stack([logs[-1, letters] for logs in row]) for row in wanted])
    for batch_size, tokens in ((7, 4096), (3, 100)):
        monkeypatch.setattr(engine, "PASS_TOKENS", tokens)
        found = score_letters(model, prompts, letters, rows, batch_size)
        torch.testing.assert_close(found, last, atol=1e-5, rtol=0)
        assert torch.equal(found.argmax(-1), last.argmax(-1))
    nats, targets = score_loss(model, prompts, rows, 7)
    for k, row in enumerate(wanted):
        for j, (logs, ids) in enumerate(zip(row, prompts)):
            goal = torch.tensor(ids[1:])
            losses = -logs[torch.arange(len(goal)), goal][~torch.isin(goal, special(model))]
            assert abs(nats[k, j].item() - losses.double().sum().item()) < 1e-5 * targets[j]
    moved = (found - found[0]).abs().amax((1, 2))
    assert all((m > 1e-3) == (edit.method not in ("none", "sae-patched")) for m, edit in zip(moved, rows))


def test_answers_behind_one_question_share_it(model, make_sae, scale_of, monkeypatch):
    """Questions are run once for all of their options, and once for each edit; every method, as in a plain pass."""
    low, high = make_sae(model, spoil=dead), make_sae(model, layer=2, hook_name="blocks.2.hook_resid_post", seed=1)
    low.scale = scale_of(model)
    questions, options = (some_ids(model, shape, seed=seed).tolist() for shape, seed in (((3, 14), 5), ((12, 24), 6)))
    first = [13 + k // 4 % 2 for k in range(12)]
    windows = [[*questions[k // 4][: first[k]], *row[10 : 13 + k % 4]] for k, row in enumerate(options)]
    rows = every_method(low, high, [gate_between(model, sae, [0, 2], windows) for sae in (low, high)])
    rows = [edit for edit in rows if not edit.needs_whole_prompt or len(edit.at) == 1]
    run = planned(model, rows, data.padded(windows, model.tokenizer, "cpu"))
    assert run.stages[0][0].ids.tolist() == [question[:13] for question in questions] and len(run.stages) == 2
    sizes = []
    handle = model.blocks[3].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    for layer in (1, 2):
        run.run_copies(sorted((copy for copy in run.copies if copy.layer == layer), key=lambda copy: copy.start))
    handle.remove()
    edited_questions = {(c.layer, c.edit, i if c.edit.needs_whole_prompt else c.prompt // 4)
                        for i, c in enumerate(run.copies)}  # fmt: skip
    assert sum(sizes) == len(edited_questions) + len(run.copies) and len(edited_questions) < 0.7 * len(run.copies)
    for batch_size, tokens in ((12, 4096), (5, 100)):
        monkeypatch.setattr(engine, "PASS_TOKENS", tokens)
        nats, _ = score_loss(model, windows, rows, batch_size, first=first)
        for k, edit in enumerate(rows):
            for j, ids in enumerate(windows):
                goal = torch.tensor(ids[1:])
                losses = -plain_pass(model, edit, ids)[torch.arange(len(goal)), goal]
                counted = ~torch.isin(goal, special(model)) & (torch.arange(1, len(ids)) >= first[j])
                assert nats[k, j].item() == pytest.approx(losses[counted].double().sum().item(), abs=1e-4)


def test_only_edits_that_look_no_further_share_what_is_run():
    far, near = (Edit("", at={1: SimpleNamespace(needs_whole_prompt=whole)}) for whole in (True, False))
    copies = [engine.Copy(prompt, 1, 0, edit, []) for edit in (near, far) for prompt in range(3)]
    ones, shares = engine.distinct(copies, torch.tensor([0, 0, 1, 0, 0, 1]))
    assert ones.tolist() == [0, 2, 3, 4, 5] and shares.tolist() == [0, 0, 1, 2, 3, 4]


def test_windows_that_begin_alike_come_together(gemma):
    windows, first = [[2, 9 - k % 3, 5, k] for k in range(9)], [3] * 9
    picked = [order for order, _ in data.batches(windows, 3, gemma.tokenizer, "cpu", first=first)]
    assert [{k % 3 for k in some} for some in picked] == [{2}, {1}, {0}]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_run_once_saves_most(seed):
    """Against every length that could be shared."""
    rng = random.Random(seed)
    batch, length = rng.randint(1, 7), rng.randint(2, 30)
    starts = [[rng.randrange(3) for _ in range(length)] for _ in range(rng.randint(1, 3))]
    rows = [[*rng.choice(starts)[: (cut := rng.randint(0, length))], *(rng.randrange(3) for _ in range(length - cut))]
            for _ in range(batch)]  # fmt: skip
    saved = {n: (batch - len({tuple(row[:n]) for row in rows})) * n for n in range(1, length)}
    n, places = engine.beginnings(rows)
    best = max(saved.values())
    if n == 0:
        assert best < engine.WORTH_SHARING * (batch - 1) or best == 0
    else:
        assert saved[n] == best >= engine.WORTH_SHARING * (batch - 1)
        assert all((places[i] == places[j]) == (rows[i][:n] == rows[j][:n]) for i in range(batch) for j in range(batch))


def test_a_copy_begins_with_the_first_token_that_any_of_its_layers_changes(gemma, make_sae):
    """A later layer's edit may begin before that of an earlier one."""
    low, high = make_sae(gemma, spoil=dead), make_sae(gemma, layer=2, hook_name="blocks.2.hook_resid_post", seed=1)
    ids = some_ids(gemma, (1, 24), seed=5)
    fires = edits.Latents(low, range(D_SAE)).encode(edits.residual_stream(gemma.original_model, ids, 1))[0][0] > 0
    fires[~torch.isin(ids[0], special(gemma), invert=True)] = False
    late = max((int(fires[:, i].nonzero()[0]), i) for i in range(D_SAE) if fires[:, i].any())
    parts = [make("clamp", low, features=[late[1]], clamp=-4.0), make("clamp", high, features=list(FIRST))]
    both = Edit("both", at=parts[0].at | parts[1].at)
    run = planned(gemma, [both], ids)
    assert run.copies[0].layer == 1 and run.copies[0].start < late[0]
    found = score_letters(gemma, ids.tolist(), [20, 21, 22, 23], [both])[0, 0]
    torch.testing.assert_close(found, plain_pass(gemma, both, ids[0].tolist())[-1, [20, 21, 22, 23]], atol=1e-5, rtol=0)


def test_equal_changes_behind_other_layers_are_no_equal_copies(gemma):
    huge = lambda h, mask: torch.where(mask[..., None], h + 2.0**30, h)  # noqa: E731 (rounds h away)
    rows = [Edit("one", at={1: huge}), Edit("other", at={2: huge})]
    run = planned(gemma, rows, some_ids(gemma))
    assert not set(run.rows[0].tolist()) & set(run.rows[1].tolist())


def test_a_changes_hash_knows_its_places():
    change, weights = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)), engine.odd_numbers(9)
    known = engine.hashes_of(change, weights[:5])
    assert len({*known, *engine.hashes_of(change.flip(1), weights[:5]), *engine.hashes_of(-change, weights[:5]),
                *engine.hashes_of(change.flip(2), weights[:5])}) == 8  # fmt: skip
    wider = torch.zeros(2, 6, 9)  # the same entries among others that nothing happens to, in another order
    wider[..., [4, 1, 0, 3, 2]] = change[..., [4, 1, 0, 3, 2]]
    assert engine.hashes_of(wider, weights) == known
    order = torch.tensor([3, 0, 4, 1, 2])
    assert engine.hashes_of(change[..., order], weights[order]) == known


@pytest.mark.slow
def test_every_method_on_tiny():
    """Questions as they are asked, edits behind layers 3 and 7 and both."""
    model = common.load_model("tiny", "cpu")
    low, high = (common.load_sae(None, layer, model) for layer in (3, 7))
    low.scale = 4.0
    asked = [prompt(row) for name in ("wmdp_bio", "mmlu") for row in data.load(name).rows[::60]]
    prompts, letters = encode_prompts(model.tokenizer, asked)
    rows = every_method(low, high, [0.3, 0.3])
    wanted = torch.stack([torch.stack([plain_pass(model, edit, ids)[-1, letters] for ids in prompts]) for edit in rows])
    found = score_letters(model, prompts, letters, rows)
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-6)  # fp32: what shares a pass moves one by 2e-5
    assert torch.equal(found.argmax(-1), wanted.argmax(-1)) and (found[1:] - found[0]).abs().amax() > 0.1


def test_gates_part_the_prompts(gemma, make_sae):
    sae, prompts = make_sae(gemma, spoil=dead), rows_of_ids(gemma)
    rows = [make("dsg", sae, features=[0, 2], clamp=-4.0, gate=gate / 20) for gate in range(20)]
    found = score_letters(gemma, prompts, [20, 21, 22, 23], [NONE, *rows])
    moved = ((found[1:] - found[0]).abs().amax(2) > 1e-6).sum(1)  # (20,) prompts that each gate lets through
    assert moved[0] > moved[8] > moved[-1] and (moved.diff() <= 0).all()


def test_what_changes_decides_about_sharing(gemma, make_sae):
    """Not the method, nor the list of features: equal changes are one copy, others never are."""
    sae, prompts = make_sae(gemma, spoil=dead), rows_of_ids(gemma)
    ids = data.padded(prompts, gemma.tokenizer, "cpu")
    features = list(FIRST)
    same = [
        make("clamp", sae, features=features, clamp=-3.0),
        make("random-features", sae, features=[*features[::-1], *DEAD], clamp=-3.0),
        make("conditional-clamp", sae, features=features, clamp=-3.0, threshold=1e-30),
    ]
    other = [
        make("clamp", sae, features=features, clamp=-3.0000002),
        make("clamp", sae, features=features[:-1], clamp=-3.0),
        make("dsg", sae, features=features, clamp=-3.0, gate=0.0),
        Edit("half", at={1: lambda h, mask: h * 0.5}),
        Edit("half", at={1: lambda h, mask: h * 0.5, 3: lambda h, mask: h}),
    ]
    run = planned(gemma, [NONE, *same, *other], ids)
    assert torch.equal(run.rows[1], run.rows[2]) and torch.equal(run.rows[1], run.rows[3])
    assert len({tuple(row.tolist()) for row in run.rows}) == 2 + len(other)


# ------------------------------------------------------------------------------ families, and what is no number

KNOWN = ["gemma4", "phi3", "olmo2", "falcon", "falcon_alibi", "mpt", *FAMILIES]
UNKNOWN = ["bloom", "mamba", "lfm2"]
LONG_TAIL = ["jamba", "falcon_h1", "recurrent_gemma"]


def engine_checked(get_model, family, dtype="float32"):
    model = get_model(family, dtype)
    engine.CHECKED.pop(model, None)
    engine.check_engine(model, [1])
    return model


@pytest.mark.parametrize("family", KNOWN)
def test_families_that_the_engine_knows_pass_its_check(get_model, family):
    model = engine_checked(get_model, family)
    assert engine.CHECKED[model] == {1}


def test_bfloat16_passes_the_engines_check(half_model):
    engine_checked(lambda *_: half_model, "")


@pytest.mark.parametrize("family", [*UNKNOWN, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG_TAIL)])
def test_families_that_the_engine_does_not_know_are_refused_in_a_line(get_model, family):
    with pytest.raises(UserError, match=r"many edits in one pass") as caught:
        engine_checked(get_model, family)
    assert "\n" not in str(caught.value)


def test_rows_are_not_mixed_up_even_in_bfloat16(get_model, monkeypatch):
    """Copies that get another prompt's positions, in the one dtype whose rounding is large."""
    real = OnePass.later_layers
    mixed = lambda self, h, *rest: real(self, h, *rest).roll(1, 0)  # noqa: E731
    monkeypatch.setattr(OnePass, "later_layers", mixed)
    with pytest.raises(UserError, match="other probabilities"):
        engine_checked(get_model, "gemma2", "bfloat16")


def test_scoring_checks_the_engine_first(get_model):
    model = get_model("bloom")
    with pytest.raises(UserError, match="many edits in one pass"):
        score_letters(model, [[2, 30, 31]], [20, 21, 22, 23], [Edit("a", at={1: lambda h, mask: -h})])


def test_letters_of_a_model_whose_layers_share_keys_and_values(get_model, make_sae, monkeypatch, plainly):
    """As many copies as prompts, more and fewer."""
    model = get_model("gemma4")
    sae, prompts = make_sae(model, spoil=dead), rows_of_ids(model)
    wanted = plainly(score_letters, model, prompts, [20, 21, 22, 23], ablations(sae))
    for batch_size, tokens in ((3, 40), (4, 4096), (10, 100)):
        monkeypatch.setattr(engine, "PASS_TOKENS", tokens)
        found = score_letters(model, prompts, [20, 21, 22, 23], ablations(sae), batch_size)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_logits_are_capped_as_the_text_config_says(get_model):
    model = get_model("gemma4")
    h, cap = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)) * 100, 30.0
    config = model.original_model.config
    model.original_model.config = SimpleNamespace(get_text_config=lambda: config)  # as of a model of images and text
    try:
        found = engine.head(model, h)
    finally:
        model.original_model.config = config
    torch.testing.assert_close(found, torch.tanh(model.unembed(h) / cap) * cap)


def test_a_score_that_is_not_finite_names_its_question(gemma, make_sae):
    sae, prompts = make_sae(gemma), [[2, 30, 31], [2, 77, 78], [2, 79, 80]]
    huge = [NONE, make("clamp", sae, features=list(range(D_SAE)), clamp=-3e38)]
    told = f"question 0 .*{gemma.tokenizer.decode([30, 31]).strip()}.*under clamp are not finite"
    with pytest.raises(UserError, match=told):
        score_letters(gemma, prompts, [20, 21, 22, 23], huge)
    with pytest.raises(UserError, match=r"text 0 .* not finite"):
        score_loss(gemma, prompts, huge)


def test_what_is_not_finite_is_named_by_the_first_row(tokenizer):
    found = torch.zeros(2, 3, 4)
    found[1, 2, 0], found[0, 1, 3] = torch.nan, torch.inf
    with pytest.raises(UserError, match=r"question 1 .*under first"):
        evaluation.refuse_not_numbers(found, [[2, 30]] * 3, [Edit("first"), Edit("b")], "question", tokenizer)


def test_a_first_token_that_is_a_word_is_not_edited(gemma, make_sae, plainly):
    """In one stage and in two: behind what all prompts begin with no token is the first."""
    sae = make_sae(gemma, spoil=dead)
    rows = [row[1:] for row in rows_of_ids(gemma) if len(row) > 12]
    same = [[*rows[0][:9], *row[9:]] for row in rows]
    for prompts in (rows, same):
        wanted = plainly(score_letters, gemma, prompts, [20, 21, 22, 23], ablations(sae)[:10])
        found = score_letters(gemma, prompts, [20, 21, 22, 23], ablations(sae)[:10])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
