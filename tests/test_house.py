"""The structure that README promises: few files on few floors, explicit arguments, nothing hung on others' objects."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"feature_ablate_1", "feature_ablate_2", "feature_ablate_3", "feature_importance", "pareto", "baselines",
           "robustness", "lm_eval_ablated", "train_sae"}  # fmt: skip
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
# Where a tokenizer, an SAE or a model is loaded or made, the one place that may set an attribute of it
LOADERS = {"load_hf", "load_tokenizer", "load_sae", "as_bridge", "new_sae", "__init__"}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def functions(name: str):
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.Lambda)]


def imported(name: str) -> set[str]:
    """Modules of the project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & set(MODULES)


@cache
def floor(name: str) -> int:
    return 1 + max(map(floor, imported(name)), default=0)


def test_files_lines_and_floors():
    """Lines of code and its comments; of the lessons those of their code cells, not their prose and exercises."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    for name in filter(re.compile("feature_").match, texts):
        texts[name] = "\n".join(re.split(r"^# %% \[markdown\](?:.|\n)*?(?=^# %%$|\Z)", texts[name], flags=re.MULTILINE))
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    assert len(MODULES) <= 19 and sum(lines.values()) <= 7980, (len(MODULES), sum(lines.values()))
    assert lines["common"] <= 300 and lines["engine"] <= 350, lines
    assert max(map(floor, MODULES)) <= 6, {name: floor(name) for name in MODULES}


def test_no_script_is_imported():
    for name in MODULES:
        assert not imported(name) & SCRIPTS, name
    assert set(MODULES) >= SCRIPTS


def test_the_command_line_stays_in_the_scripts():
    for name in set(MODULES) - SCRIPTS:
        for node in functions(name):
            arguments = {one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            if (name, getattr(node, "name", "")) != ("runs", "__init__"):  # a Run writes the settings down
                assert not arguments & {"s", "args"}, (name, getattr(node, "name", "lambda"))
        flags = [node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)
                 and isinstance(node.value, str) and name != "runs"]  # fmt: skip
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree(name))
                      if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)}  # fmt: skip
        assert not [text for text in flags if re.search(r"(^|\s)--[a-z]", text) and text not in docstrings], name


def test_nothing_is_hung_on_others_objects():
    """Attributes are set on self, and on what is loaded only by the function that loads it."""
    for name in MODULES:
        for function in functions(name):
            if getattr(function, "name", "") in LOADERS:
                continue
            for node in ast.walk(function):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
                    node, ast.AugAssign | ast.AnnAssign) else []  # fmt: skip
                for target in targets:
                    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                        owner = target.value.id.lower()
                        assert not any(word in owner for word in ("model", "tokenizer", "sae", "bridge", "lm")), (
                            name, target.lineno, owner)  # fmt: skip
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id != "setattr", (name, node.lineno)


def test_no_dictionary_of_sources_is_filled():
    for name, path in MODULES.items():
        assert "sources |=" not in path.read_text(encoding="utf-8"), name
