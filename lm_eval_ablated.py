# %% [markdown]
r"""
lm-eval with any edit in place: any of its tasks, any number of features, several layers, one or many GPUs.

    python lm_eval_ablated.py --layer 7 --n-features 50 --tasks tiny_wmdp_bio,tiny_mmlu --unablated
    python lm_eval_ablated.py --features results/feature_ablate_2_tiny_L7_n50.json --tasks tiny_openwebtext --unablated
    python lm_eval_ablated.py --record results/baselines_dsg_tiny_L7.json --unablated
    python lm_eval_ablated.py --method dsg --layer 3 --n-features 20 --clamp -10
    python lm_eval_ablated.py --tasks list
    accelerate launch --num_processes 8 lm_eval_ablated.py --model gemma-2-2b-it --layer 7 --n-features 50 \
        --tasks wmdp_bio,mmlu --unablated --batch_size auto

Features are picked as in the lessons, or read with --features: a JSON list of ids of --layer's SAE, {"layer": [ids]}
for several layers, or a record that a lesson, a sweep or baselines.py wrote, whose edit is taken as it is (--record is
the same flag). --method makes one of baselines.py's edits. With --unablated the model is scored without any too, and
the two are compared question by question, which lm-eval itself does not do. Questions that features were picked on are
left out. Tasks are lm-eval's and those of lm_eval_tasks/, options lm-eval's own.

In lm-eval's command line the model is called sae-ablated:

    python -c "import lm_eval_ablated, lm_eval.__main__ as m; m.cli_evaluate()" --model sae-ablated \
        --model_args pretrained=tiny/model,sae=tiny/sae/layer_3,layer=3,features=features.json,clamp=-80 \
        --include_path lm_eval_tasks --tasks tiny_wmdp_bio --batch_size 16

On tiny the first command prints the scores that lesson 2 does.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. Flags come first: --help need not wait for other imports.

# %%
from flags import BY_FEATURES, GRIDS, USUAL, answered, command_line, latent_flags, parser, settings

flags = parser(__doc__, without=("--max-memory", "--skip-long"))


def number_or_auto(text: str) -> int | str:
    return text if text.startswith("auto") else int(text)


def lm_eval_flag(name: str, **options) -> None:
    flags.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, **options)


flags.add_argument("--tasks", help="comma-separated; list shows this folder's (default: the preset's stand-ins, or "
                                   "wmdp_bio,sae_mmlu_saebench)")  # fmt: skip
flags.add_argument("--layer", type=int, help="layer of the SAE (default: 7, or the record's)")
flags.add_argument(
    "--n-features", type=int, help="how many features to pick (default: 50), or which setting of a record"
)
flags.add_argument("--clamp", type=float, help="0 or negative (default: the preset's, or the record's)")
flags.add_argument("--features", "--record", metavar="FILE", help="JSON list of ids, {layer: ids}, or a record, whose "
                   "edit is taken as it is (default: pick them)")  # fmt: skip
flags.add_argument("--method", choices=list(GRIDS), help="what to do with the features (default: zero or clamp them)")
flags.add_argument("--setting", nargs="+", metavar="NAME=NUMBER", help="what else the method is told, as threshold=0.5 "
                   "(of picked features, times the mean activation), strength=1.5, behind=1")  # fmt: skip
latent_flags(flags)
flags.add_argument("--unablated", action="store_true", help="score the model without ablation too, and compare")
flags.add_argument("--subjects", help="comma-separated: only the questions on these")
flags.add_argument("--samples", nargs="+", metavar="TASK:FILE", help="JSON list of the indices to ask of a task")
flags.add_argument("--robust", nargs="?", const="all", choices=["all", "question"], help="ask only what the model gets "
                   "right in all 24 orders of the options; question: and not without the question too")  # fmt: skip
lm_eval_flag("batch_size", type=number_or_auto, default=16, help="a number, auto or auto:N (default: %(default)s)")
lm_eval_flag("max_batch_size", type=int, default=64, help="where auto starts (default: %(default)s)")
lm_eval_flag("num_fewshot", type=int, help="examples in front of each question (default: the task's)")
lm_eval_flag("apply_chat_template", nargs="?", const=True, default=False, help="wrap prompts, optionally by name")
lm_eval_flag("system_instruction", help="text in front of every prompt")
lm_eval_flag("model_args", help="more arguments of lm-eval's hf, as parallelize=True,max_length=2048")
lm_eval_flag("gen_kwargs", help="for tasks that generate, as max_gen_toks=20,temperature=0")
lm_eval_flag("include_path", help="folder with more task files")
lm_eval_flag("use_cache", metavar="FOLDER", help="keep answers there; every ablation has a cache of its own")
lm_eval_flag("output_path", metavar="FOLDER", help="lm-eval's own result files go there")
lm_eval_flag("log_samples", action="store_true", help="and its per-question log, with --output_path")
answered(flags, __name__)

# %%
import argparse
import copy
import difflib
import json
import logging
import math
import time
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

from lm_eval import simple_evaluate
from lm_eval.api.model import CachingLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

import processes
import records
import show
from data import (
    EMBEDDED,
    HERE,
    PUBLISHED,
    UserError,
    digest,
    first_line,
    halves,
    load_rows,
    picking_texts,
    picking_windows,
    sample,
)
from edits import NONE, Edit
from evaluation import PERMUTATIONS, of_features
from hub import check_same, model_source, sanity_gate
from lm_eval_model import (
    AblatedLM,
    Scored,
    Spread,
    edit_from,
    features_of,
    from_file,
    is_record,
    load_ablated,
    load_saes,
    logged,
    metric_of,
    model_args,
    of_record,
    read_json,
    scores_of,
)
from methods import Measured, edit_for, measure

TASKS = HERE / "lm_eval_tasks"
# lm-eval has advice for those who write a task with data of its own; users of these tasks need none
logging.getLogger("lm_eval.api.task").addFilter(lambda note: "Custom kwargs can be passed" not in note.getMessage())
TINY_TASKS, HUB_TASKS = "tiny_wmdp_bio,tiny_mmlu", "wmdp_bio,sae_mmlu_saebench"
QUIZ = {"question", "choices", "answer"}  # what documents of wmdp's and mmlu's form have
LAYER, N_FEATURES = 7, 50  # where neither a flag nor a record says otherwise
# What records, and so pareto.py, call a task's data set; other tasks keep their names
DATA_SETS = {"tiny_wmdp_bio": "wmdp_bio", "tiny_mmlu": "mmlu", "sae_mmlu_saebench": "mmlu",
             "tiny_openwebtext": "openwebtext", "sae_openwebtext": "openwebtext"}  # fmt: skip

# %% [markdown]
# ## Tasks, and which of their questions are asked


# %%
def find_tasks(s) -> dict[str, tuple]:
    """{requested name: (what lm-eval loaded: task or group, its tasks)}. Raises UserError for unknown names."""
    folders = [str(TASKS), *([s.include_path] if s.include_path else [])]
    names = list(dict.fromkeys(name.strip() for name in s.tasks.split(",")))
    manager = TaskManager(include_path=folders, include_defaults=False, metadata={"data": s.data})
    if not set(names) <= set(manager.all_tasks):  # reading lm-eval's 14,000 task files takes seconds
        manager = TaskManager(include_path=folders, metadata={"data": s.data})
    if unknown := [name for name in names if name not in manager.all_tasks]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, 5, 0.5)
        raise UserError(f"--tasks: no {unknown[0]}; near: {', '.join(near) or '-'}; --tasks list, or lm-eval ls tasks")
    found = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except UserError:
            raise
        except Exception as error:  # as in data.from_hub, anything from OSError to RuntimeError
            raise UserError(f"cannot load task {name}: {first_line(error)}. Its data may be gated or out of reach; "
                            f"see its dataset_path at https://huggingface.co/datasets") from error  # fmt: skip
        found[name] = (loaded["groups"].get(name), [loaded["tasks"][key] for key in sorted(loaded["tasks"])])
    return found


def list_tasks() -> None:
    for path in sorted(TASKS.glob("*.yaml")):
        print(f"{path.stem:32}{path.read_text().splitlines()[0].lstrip('# ')}")


def samples_of(s) -> dict[str, list[int]]:
    """{task: indices} of --samples TASK:FILE."""
    found = {}
    for entry in s.samples or []:
        task, _, path = entry.partition(":")
        ids = read_json(path)
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"--samples {entry}: a JSON list of indices is wanted, as [0, 3, 4]")
        found[task] = sorted(set(ids))
    return found


def choose(tasks: dict[str, tuple], s, half: bool) -> dict[str, list[int]]:
    """{task: indices of the documents to ask}, tasks without any left out.

    half: of quizzes like wmdp's and mmlu's only the reporting half. --samples takes its place, --subjects narrows it
    down, and --limit keeps a seeded sample of what is left of each name in --tasks; documents that are one question in
    several orders (`number`) stay together. Raises UserError where nothing is left.
    """
    wanted, chosen = samples_of(s), {}
    subjects = {name.strip() for name in s.subjects.split(",")} if s.subjects else None
    if strange := set(wanted) - {part.task_name for _, parts in tasks.values() for part in parts}:
        raise UserError(f"--samples: {strange.pop()} is none of the tasks to run")
    for name, (_, parts) in tasks.items():
        questions, there, total = {}, set(), 0  # {(task, question): documents}
        for part in parts:
            docs = list(part.eval_docs)
            ids = wanted.get(part.task_name) or range(len(docs))
            if max(ids) >= len(docs):
                raise UserError(f"--samples: {part.task_name} has {len(docs)} documents, there is no {max(ids)}")
            if half and part.task_name not in wanted and set(docs[0]) >= QUIZ:
                ids = halves([{"question": doc.get("left_out", doc["question"])} for doc in docs], s.seed)[1]
            there |= {doc.get("subject") for doc in docs}
            for i in ids:
                if subjects is None or docs[i].get("subject") in subjects:
                    questions.setdefault((part.task_name, docs[i].get("number", i)), []).append(i)
            total += len(docs)
        if subjects and (unknown := subjects - there):
            known = ", ".join(sorted(filter(None, there))) or "none"
            raise UserError(f"--subjects: {name} has no {', '.join(sorted(unknown))}; there are {known}")
        if not questions:
            raise UserError(f"{name}: --samples, --subjects and --pick-on leave no question to ask")
        for key in sample(list(questions), s.limit, s.seed):
            chosen.setdefault(key[0], []).extend(questions[key])
        asked = sum(len(chosen.get(part.task_name, [])) for part in parts)
        unseen = half and not {part.task_name for part in parts} & set(wanted)
        print(f"{name}: {asked} of {total} documents" + (", none that features were picked on" if unseen else ""))
    return {name: sorted(ids) for name, ids in chosen.items()}


def to_ask(tasks: dict, chosen: dict) -> list:
    """What lm-eval is to run: a group as a whole if all of its tasks have questions to ask, else those that have."""
    items = []
    for whole, parts in tasks.values():
        left = [part for part in parts if part.task_name in chosen]
        items += [whole] if whole is not None and len(left) == len(parts) else left
    return items


def ask(lm: AblatedLM, tasks: dict, chosen: dict[str, list[int]], s, ablated: bool) -> dict | None:
    """lm-eval's results of one run, with its samples; None on all processes but the first."""
    lm.ablated = ablated
    # every process caches what it was asked, every ablation has a cache of its own
    cache = s.use_cache and Path(s.use_cache) / f"{lm.fingerprint()}_process{processes.state().process_index}.db"
    inner = CachingLM(lm, str(cache)) if cache else lm
    tracker = EvaluationTracker(output_path=str(Path(s.output_path) / ("ablated" if ablated else "unablated"))
                                if s.output_path else None)  # fmt: skip
    results = simple_evaluate(
        Spread(inner), tasks=to_ask(tasks, chosen), samples=chosen, num_fewshot=s.num_fewshot, batch_size=s.batch_size,
        apply_chat_template=s.apply_chat_template, system_instruction=s.system_instruction, gen_kwargs=s.gen_kwargs,
        evaluation_tracker=tracker, bootstrap_iters=1000, task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    if results and s.output_path and processes.is_first():
        samples = results["samples"] if s.log_samples else None
        tracker.save_results_aggregated({k: v for k, v in results.items() if k != "samples"}, samples)
        for name in samples or []:
            tracker.save_results_samples(name, samples[name])
    return results


def in_order(task, order: tuple[int, ...], question: bool):
    """The task with each question's options in that order, and without the question if `question` is False."""

    def changed(doc: dict) -> dict:
        new = {**doc, "choices": [doc["choices"][i] for i in order], "answer": order.index(doc["answer"])}
        return new if question else {**new, "question": ""}

    class InOrder(type(task)):
        eval_docs = [changed(doc) for doc in task.eval_docs]

    twin = copy.copy(task)
    twin.__class__ = InOrder
    return twin


def right_in_all_orders(lm: AblatedLM, tasks: list, chosen: dict, s, question: bool = True) -> dict[str, list[int]]:
    """{task: those of the chosen documents that the unablated model gets right in all 24 orders of the options}, asked
    as they are scored: adapter, examples, chat template and all. A document is asked no more after a wrong answer."""
    alive, quiet = {task.task_name: chosen[task.task_name] for task in tasks}, argparse.Namespace(**vars(s))
    quiet.output_path = None
    for order in PERMUTATIONS:
        twins = {task.task_name: in_order(task, order, question) for task in tasks if alive[task.task_name]}
        if not twins:
            break
        asked, parts = {name: alive[name] for name in twins}, {name: (None, [twin]) for name, twin in twins.items()}
        with patch("lm_eval.evaluator.add_env_info"):  # asks git and pip, for files that are not written here
            found = ask(lm, parts, asked, quiet, ablated=False)
        rows = [(name, i, row) for name, twin in twins.items() if found
                for i, row in zip(asked[name], logged(found, [twin]), strict=True)]  # fmt: skip
        right = [(name, i) for name, i, row in rows if row[metric_of(row)] == 1]
        right = processes.from_all(right)  # lm-eval gives results to the first process alone
        alive |= {name: [i for other, i in right if other == name] for name in twins}
    return alive


def keep_robust(lm: AblatedLM, tasks: dict, chosen: dict, s) -> dict[str, list[int]]:
    """Of the chosen documents those that the unablated model gets right in all 24 orders (SAEBench, arXiv 2503.09532);
    with --robust question not those that it gets right in all 24 orders without the question as well."""
    parts = [part for _, parts in tasks.values() for part in parts if part.task_name in chosen]
    for part in parts:
        docs = part.eval_docs
        if not set(docs[0]) >= QUIZ or {len(docs[i]["choices"]) for i in chosen[part.task_name]} != {4}:
            raise UserError(f"--robust: {part.task_name} does not ask four-way questions")
    right = right_in_all_orders(lm, parts, chosen, s)
    if s.robust == "question":
        guessed = right_in_all_orders(lm, parts, right, s, question=False)
        right = {name: [i for i in ids if i not in guessed[name]] for name, ids in right.items()}
    right = {name: ids for name, ids in right.items() if ids}
    if empty := [name for name, (_, parts) in tasks.items() if not {p.task_name for p in parts} & set(right)]:
        raise UserError(f"{empty[0]}: --robust leaves no question to ask")
    return right


# %% [markdown]
# ## The run: features, tasks, answers, scores


# %%
def given_edit(s, given: dict) -> dict | None:
    """What --features says is to be applied, as lm_eval_model.from_file has it; None where features are to be picked.
    A record also settles what else is its own: SAE, data, seed, and whether all questions may be scored."""
    if s.features is None:
        return None
    s.pick_on = "all"  # of a bare list nobody knows what it was picked on
    record = read_json(s.features)
    wanted = {**given, "method": s.method, **numbers_of(s)}
    if not is_record(record):
        return from_file(s.features, s.layer, {**wanted, "clamp": s.clamp})
    if record["model"] != s.model:
        raise UserError(f"{s.features} is a record of {record['model']}, the model is {s.model}")
    check_same(s.features, record, "model", model_source(s.model))
    saes, there = record["sae"], record["layer"]
    layers = of_record(s.features, record, **wanted)["setting"]["layer"]
    if s.sae is None and saes and isinstance(layers, int):
        source = saes[there.index(layers)] if isinstance(saes, list) else saes
        s.sae = str(HERE / source) if (HERE / source).is_dir() else source
    s.seed, s.pick_on = record["seed"], record["settings"]["pick_on"]
    s.data = s.data or record["settings"]["data"]
    s.edit_special = record["settings"].get("edit_special", s.edit_special)
    return from_file(s.features, s.layer, wanted, s.sae, s.model)


def numbers_of(s) -> dict:
    """--setting NAME=NUMBER ... as {name: number}."""
    found = {}
    for entry in s.setting or []:
        name, _, value = entry.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise UserError(f"--setting {entry}: NAME=NUMBER is wanted, as gate=0.1") from error
    return found


def picked(m: Measured, s) -> Edit:
    """As many features as --n-features, as in the lessons; with --method, its setting, made as baselines.py does."""
    numbers = numbers_of(s)
    if s.method:
        one = {axis: s.n_features if axis == "n_features" else USUAL[axis] for axis in GRIDS[s.method][0]}
        takes = [axis for axis in one if axis not in ("n_features", "clamp")]  # which have flags of their own
        if strange := set(numbers) - set(takes):
            raise UserError(f"--setting {min(strange)}: {s.method} takes {', '.join(takes) or 'none'}")
        edit = edit_for(s.method, {**one, **numbers}, m)
    elif numbers:
        raise UserError(f"--setting {min(numbers)}: of which --method?")
    else:
        edit = of_features("sae-ablation", m.sae, m.features(s.n_features), s.clamp, layer=s.layer)
    for features in features_of(edit.point()).values():
        show.print_features(features, *m.rates, show.top_tokens(m.lm, m.sae, features, m.forget), m.sae)
    return edit


def prepare(lm: AblatedLM, s, point: dict | None, sources: dict) -> tuple[Edit, dict, dict]:
    """The SAE check and picking, on the model that is scored. Returns the edit, {layer: what the check found} and
    {layer: SAE}. point: given_edit's."""
    layers = list(features_of(point)) if point else [s.layer] if s.method in (None, *BY_FEATURES) else []
    saes, view, noted = load_saes(lm, s.sae, layers, s.model), Scored(lm), {}
    wmdp, noted["wmdp_bio"] = load_rows("wmdp_bio", s.model, s.data)
    forget, retain = picking_texts(wmdp, halves(wmdp, s.seed, s.pick_on)[0], s, noted)
    sources |= {name: found for name, found in noted.items() if name == "wikitext" or not point}
    if not point:
        measured = measure(view, s.layer, saes.get(s.layer), forget, retain, s.clamp, s)
        edit = picked(measured, s)
        return edit, {s.layer: measured.sanity} if measured.sanity else {}, saes
    _, (windows, *_) = picking_windows(lm.tokenizer, forget, retain, s)
    sanity = {number: sanity_gate(view, sae, windows, not s.no_sanity) for number, sae in saes.items()}
    return edit_from(point, saes), sanity, saes


def name_in_record(name: str, names: list[str]) -> str:
    """The data set's name, unless an earlier task of this run has it."""
    short = DATA_SETS.get(name, name)
    return name if short in [DATA_SETS.get(other, other) for other in names[: names.index(name)]] else short


def source_of(name: str, tasks: list, chosen: dict, s) -> dict:
    """Where documents come from, and which were asked: indices over all tasks' documents, one after another."""
    short, rows, asked = DATA_SETS.get(name, name), [], []
    for task in tasks:
        asked += [len(rows) + i for i in chosen.get(task.task_name, [])]
        rows += map(dict, task.eval_docs)
    if name in ("tiny_wmdp_bio", "tiny_mmlu"):
        found = load_rows(short, "tiny", s.data)[1]
    else:
        stand_in = name.startswith("tiny_") and not s.data
        found = {"source": f"lm-eval task {name}", "sha256": digest(rows), "stand_in": stand_in}
    if s.model not in EMBEDDED and (note := PUBLISHED.get(name.removeprefix("sae_"))):
        found["published"] = note
    return {**found, "task": name, "questions": asked}


def print_scores(rows: list[Edit], scores: dict, sources: dict, runs: dict) -> None:
    """Print a table for every data set; lm-eval's own where it logs no number for each document."""
    for name, values in scores.items():
        title = show.title_of(name, sources)
        if values[0] is None:
            for run_name, results in runs.items():
                print(f"\n{title}, {run_name}, lm-eval's own table\n\n{make_table(results)}")
        elif "accuracy" in values[0]:
            show.print_quiz(title, rows, values)
            show.print_published(sources, name)
        elif "nats_per_token" in values[0]:
            show.print_loss(title, rows, values)
        else:
            print(f"\n{title}: n {values[0]['n']}, {values[0]['metric']}\n")
            for row, value in zip(rows, values):
                change = "change {change:+.4f} [{change_low:+.4f}, {change_high:+.4f}]"
                change = change if value.get("change_low") is not None else ""
                print(f"  {show.label(row):34}{value['mean']:.4f}  {change.format(**value)}")


def run(**changes) -> dict:
    """run(tasks="tiny_mmlu", unablated=True): any flag by name. Returns the record; {} in all processes but the first
    and for --tasks list. Raises UserError."""
    started, sources = time.time(), {}
    given = {name: changes.pop(name, None) for name in ("layer", "n_features", "clamp")}
    layer, n, clamp = given.values()
    changes |= {"layer": LAYER if layer is None else layer, "n_features": N_FEATURES if n is None else n}
    s = settings(flags, changes)
    s.clamp = s.clamp if clamp is None else clamp
    if s.tasks == "list":
        return list_tasks() or {}
    if not -math.inf < s.clamp <= 0:
        raise UserError(f"--clamp {s.clamp:g}: a number that is 0 or negative")
    model_args(s)
    s.tasks = s.tasks or (TINY_TASKS if s.model == "tiny" or s.data else HUB_TASKS)
    point = given_edit(s, given)
    if point:
        s.layer, s.clamp = point["setting"]["layer"], point["setting"].get("clamp", s.clamp)
    if point or s.method not in (None, *BY_FEATURES):
        s.n_features = point["setting"].get("n_features") if point else None
    path = records.outputs("lm_eval_ablated.py", s, flags)
    tasks = find_tasks(s)
    chosen = choose(tasks, s, s.pick_on == "half")
    lm = load_ablated(s)
    edit, sanity, saes = prepare(lm, s, point, sources)
    lm.set_edit(edit, saes)
    if s.robust:
        chosen = keep_robust(lm, tasks, chosen, s)
    runs = {name: ask(lm, tasks, chosen, s, name == "ablated")
            for name in (["unablated"] if s.unablated else []) + ["ablated"]}  # fmt: skip
    if not processes.is_first():
        return {}

    rows = [NONE, edit] if s.unablated else [edit]
    scores = {}
    for name, (_, parts) in tasks.items():
        short = name_in_record(name, list(tasks))
        sources[short] = source_of(name, parts, chosen, s)
        scores[short] = scores_of([logged(results, parts) for results in runs.values()], lm, s.seed)
    print_scores(rows, scores, sources, runs)
    points = [row.point(**{name: values[k] for name, values in scores.items()}) for k, row in enumerate(rows)]
    used = list(saes.values())
    record = records.make_record("lm_eval_ablated.py", s, used, sources, sanity, points, started)
    record["versions"]["lm_eval"] = version("lm_eval")
    record["identity"] |= lm.identity
    record["layer"] = list(saes) if len(saes) > 1 else record["layer"]
    record["attention"] = lm.model.config._attn_implementation
    theirs = {name: results["results"] for name, results in runs.items()}
    record["lm_eval"] = json.loads(json.dumps(theirs, default=str))
    scored = {show.title_of(name, sources): values for name, values in scores.items()}
    quizzes = {title: values for title, values in scored.items() if values and "accuracy" in values[0]}
    what = f"{s.n_features} features ablated" if edit.method == "sae-ablation" else show.method_name(edit.method)
    title = f"{records.short_name(s.model)}, layer {s.layer}: {what}, lm-eval"
    records.write_record(path, record, {"accuracy": lambda: show.quiz_figure(quizzes, rows, title)} if quizzes else {})
    return record


# %%
if __name__ == "__main__":
    command_line(run, flags)
