"""The three lessons as notebooks: something to look at under every cell, names, one line for a mistake."""

import ast
import re
import runpy
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
import torch
from conftest import ROOT, lesson

import edits

LESSONS = ["feature_ablate_1.py", "feature_ablate_2.py", "feature_ablate_3.py"]


def execute(notebook, folder):
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook.cells


def shown(cell, kind):
    """What a cell put out of one kind: "stdout", "stderr", or "image/png"."""
    if "/" in kind:
        return [out["data"][kind] for out in cell.outputs if kind in out.get("data", {})]
    return "".join(out["text"] for out in cell.outputs if out.get("name") == kind)


def figures(cell):
    """A cell's figures: images, and tokens as text."""
    return [*shown(cell, "image/png"), *shown(cell, "text/html")]


def only_names(source: str) -> bool:
    """Flags and imports: the cell that defines names and need show nothing."""
    return "args = parse(" in source


@pytest.mark.slow
@pytest.mark.parametrize("script", LESSONS)
def test_every_cell_shows_something(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = jupytext.read(ROOT / script)
    flags = next(cell for cell in notebook.cells if only_names(cell.source))
    flags.source += "\nargs.limit = 8"
    after = "print('a number', len(features) * sae.cfg.d_sae + model.cfg.d_model, len(rows), record['form'])"
    notebook.cells.append(nbformat.v4.new_code_cell(after))
    cells = [cell for cell in execute(notebook, tmp_path) if cell.cell_type == "code"]
    for cell in cells:
        assert cell.outputs or only_names(cell.source), cell.source
        assert "arning" not in shown(cell, "stderr"), cell.source
    assert sum(len(figures(cell)) for cell in cells) >= 4
    assert re.search(r"a number \d+", shown(cells[-1], "stdout"))
    assert list((tmp_path / "results").glob("*.json"))


@pytest.mark.slow
def test_percent_run_leaves_its_names(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    lines = [f"%run {ROOT}/feature_ablate_2.py --layer 3 --n-features 5 --limit 8", "args.layer, len(features)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line) for line in lines])
    first, last = execute(notebook, tmp_path)
    assert len(figures(first)) >= 4 and "record: " in shown(first, "stdout")
    assert last.outputs[0]["data"]["text/plain"] == "(3, 5)"


def test_a_mistake_is_one_line_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = ["from common import load_model", "load_model('no-such-model')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        execute(notebook, tmp_path)
    (out,) = [out for out in notebook.cells[1].outputs if out.output_type == "error"]
    assert len(out.traceback) == 1 and out.traceback[0].startswith("error: ") and "no-such-model" in out.traceback[0]


def test_a_lesson_has_short_cells_imports_little_and_hands_no_settings_on():
    for script in [*LESSONS, "feature_importance.py"]:
        source = (ROOT / script).read_text()
        assert not re.search(r"^def run|^if __name__", source, re.MULTILINE)
        code = [cell.source for cell in jupytext.read(ROOT / script).cells if cell.cell_type == "code"]
        lines = [[line for line in cell.splitlines() if line.strip()] for cell in code]
        assert max(map(len, lines)) <= 10 and max(len(line) for cell in lines for line in cell) <= 100, script
        assert sum(map(len, lines)) <= 100 and source.count("<details>") == 2, script
        nodes, ours = list(ast.walk(ast.parse(source))), {path.stem for path in ROOT.glob("*.py")}
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} & ours
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module in ours]
        assert len(modules) + sum(len(node.names) for node in froms) <= 16, script
        assert len(modules | {node.module for node in froms}) <= 5, script
        handed = [
            name
            for node in nodes
            if isinstance(node, ast.Call)
            for name in (*node.args, *node.keywords)
            if getattr(getattr(name, "value", name), "id", None) == "args" and ast.unparse(node.func) != "Run"
        ]
        assert not [name for name in handed if not isinstance(name, ast.Attribute)], script


@pytest.mark.slow
@pytest.mark.parametrize("script", LESSONS)
def test_the_executed_notebook_is_what_the_lesson_gives_today(script):
    """Its code and text are the lesson's, and so are its numbers, but for answers so close that a CPU decides them."""
    path = ROOT / "docs/lessons" / f"{Path(script).stem}.ipynb"
    shipped, today = nbformat.read(path, 4), runpy.run_path(str(ROOT / "docs/lessons/make.py"))["execute"](path.stem)
    assert path.stat().st_size < 1.5e6
    assert [cell.source for cell in shipped.cells] == [cell.source for cell in jupytext.read(ROOT / script).cells]
    number = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?")
    agree = []  # for each printed line: its text and its numbers; of a close answer a CPU may decide
    for theirs, ours in zip(shipped.cells, today.cells, strict=True):
        if theirs.cell_type == "code":
            for a, b in zip(*(shown(cell, "stdout").splitlines() for cell in (theirs, ours)), strict=True):
                pairs = [(float(x), float(y)) for x, y in zip(number.findall(a), number.findall(b))]
                close = all(x == pytest.approx(y, rel=0.02, abs=1.0) for x, y in pairs)
                agree.append(close and number.sub("#", a).split() == number.sub("#", b).split())
            for kind in ("image/png", "text/html"):
                assert len(shown(theirs, kind)) == len(shown(ours, kind))
    assert sum(agree) >= 0.9 * len(agree), agree


def test_the_hook_of_lesson_1_is_common_ablates(tmp_path, capsys, monkeypatch):
    """It is written in the lesson, which prints how far common.ablate is from it: where that, too, encodes all features
    and takes the picked ones, not a bit. To multiply their columns alone may round otherwise, by the CPU. And not a bit
    with features that are active on BOS, weakly or strongly, and on other tokens."""
    flags = dict(layer=3, n_features=10, limit=4, out=tmp_path / "r.json")
    off = re.compile(r"common.ablate differs by (\S+)")
    lesson(LESSONS[0], **flags)
    assert [float(x) < 2e-6 for x in off.findall(capsys.readouterr().out)] == [True] * 2

    def encode(self, h):
        return self.sae.encode(h.float())[..., self.index], torch.ones_like(h[..., :1])

    monkeypatch.setattr(edits.Latents, "encode", encode)
    names = lesson(LESSONS[0], **flags)
    assert off.findall(capsys.readouterr().out) == ["0e+00"] * 2
    sae, h, lesson_names = names["sae"], names["h"], names["edit"].__globals__
    active = sae.encode(h.float())[0] > 0  # (pos, d_sae)
    features = [*active[0].nonzero()[:, 0].tolist(), *active[-1].nonzero()[:, 0].tolist()]
    lesson_names["features"] = features = list(dict.fromkeys(features))
    assert active[0].any() and active[1:, features].any()
    for clamp in (0.0, -40.0):
        wanted = edits.ablation(sae, features, clamp).at[3](h, names["ordinary"][..., 0])
        assert torch.equal(names["edit"](h, clamp=clamp), wanted)


@pytest.mark.parametrize("kind, norm", [("jumprelu", "none"), ("standard", "layer_norm"), ("topk_rescaled", "none")])
def test_lesson_2_pushes_as_the_ablation_does_whatever_the_sae_rescales(model_folder, make_sae, get_model, tmp_path,
                                                                        kind, norm):  # fmt: skip
    """The push of some tokens, and how far the vectors move, are those of `ablation`."""
    flags = dict(model=model_folder("gpt2"), sae=make_sae(get_model("gpt2"), kind, norm).source, layer=1, clamp=-5.0)
    flags |= dict(n_features=4, controls=1, limit=6, skip_long=True, no_sanity=True, pick="any-ratio")
    flags["data"] = ROOT / "tiny/data"
    names = lesson(LESSONS[1], **flags, out=tmp_path / "r.json")
    h, sae, strongest = names["h"], names["sae"], int(names["strongest"][1])
    everywhere = torch.ones(h.shape[:2], dtype=torch.bool)

    def moved(features, clamp):
        return edits.ablation(sae, features, clamp).at[1](h, everywhere) - h

    for spot in (slice(0, 0), slice(-1, None), slice(1, -1)):
        mask, wanted = torch.zeros_like(everywhere), h.clone()
        mask[:, spot] = True
        wanted[:, spot] += moved([strongest], -5.0)[:, spot]
        assert torch.allclose(names["push"](h, None, spot=mask), wanted, atol=1e-5)
    for clamp in (0.0, -5.0):
        far = (moved(names["features"], clamp)[0].norm(dim=-1) / h[0].norm(dim=-1))[1:][names["fires"]].mean()
        assert names["shares"][clamp].item() == pytest.approx(100 * far.item(), rel=1e-4)
