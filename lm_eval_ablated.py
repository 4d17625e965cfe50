# %% [markdown]
r"""
lm-eval with SAE features ablated: any of its tasks, any number of features, several layers, one or many GPUs.

    python lm_eval_ablated.py --layer 3 --n-features 10 --tasks tiny_wmdp_bio,tiny_mmlu --unablated
    python lm_eval_ablated.py --features results/feature_ablate_2_tiny_L3_n10.json --tasks tiny_openwebtext --unablated
    python lm_eval_ablated.py --tasks list
    accelerate launch --num_processes 8 lm_eval_ablated.py --model gemma-2-2b-it --layer 7 --n-features 50 \
        --tasks wmdp_bio,mmlu --unablated --batch_size auto --dtype bfloat16

Features are picked as in the lessons, or read with --features: a JSON list of ids of --layer's SAE, {"layer": [ids]}
for several layers, or a record that a lesson or a sweep wrote. With --unablated the model is scored without ablation
too, and the two are compared question by question, which lm-eval itself does not do. Questions that features were
picked on are left out. Tasks are lm-eval's and those of lm_eval_tasks/, options lm-eval's own.

In lm-eval's command line the model is called sae-ablated:

    python -c "import lm_eval_ablated, lm_eval.__main__ as m; m.cli_evaluate()" --model sae-ablated \
        --model_args pretrained=tiny/model,sae=tiny/sae/layer_3,layer=3,features=features.json,clamp=-80 \
        --include_path lm_eval_tasks --tasks tiny_wmdp_bio --batch_size 16

tiny, the first command: what lesson 2 prints, WMDP-Bio stand-in 95.9 to 31.1% (n 74), MMLU stand-in 99.4% before and
after (n 178); 19 s and 0.9 GB on two cores.
"""

# %% [markdown]
# Start a notebook in this folder, so that the helper files beside this one can be imported.

# %%
import argparse
import copy
import difflib
import hashlib
import inspect
import itertools
import json
import logging
import math
import time
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM, CachingLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, simple_parse_args_string
from safetensors import SafetensorError

import processes
from common import (
    checked,
    command_line,
    decoder_layers,
    edited,
    layer_of,
    load_sae,
    parser,
    refuse_damaged,
    refuse_not_finite,
    settings,
    watch_tokens,
)
from data import (
    HERE,
    RETAIN_TOKENS,
    UserError,
    check_bos,
    digest,
    first_line,
    halves,
    load_rows,
    picking_texts,
    sample,
    token_windows,
    without_thought,
)
from evaluation import PERMUTATIONS, Ablation, accuracy_score, bootstrap, loss_scores, with_q_values
from hub import announce, check_same, identity
from picking import firing_rates, largest, pick_features, sanity_gate
from presets import PRESETS, model_source, sae_source
from show import (
    label,
    make_record,
    outputs,
    print_features,
    print_loss,
    print_quiz,
    quiz_figure,
    short_name,
    title_of,
    top_tokens,
    write_record,
)

TASKS = HERE / "lm_eval_tasks"
# lm-eval has advice for those who write a task with data of its own; users of these tasks need none
logging.getLogger("lm_eval.api.task").addFilter(lambda note: "Custom kwargs can be passed" not in note.getMessage())
TINY_TASKS, HUB_TASKS = "tiny_wmdp_bio,tiny_mmlu", "wmdp_bio,sae_mmlu_saebench"
QUIZ = {"question", "choices", "answer"}  # what documents of wmdp's and mmlu's form have
LAYER, N_FEATURES = 7, 50  # where neither a flag nor a record says otherwise
BATCHING = {"batch_size", "max_batch_size"}  # do not decide an answer
# Of --model_args: what flags of ours settle, and what hf hands on to transformers' from_pretrained
OURS = {"pretrained": "--model", "sae": "--sae", "features": "--features", "layer": "--layer", "clamp": "--clamp",
        "device": "--device", "dtype": "--dtype", "batch_size": "--batch_size",
        "max_batch_size": "--max_batch_size"}  # fmt: skip
FROM_PRETRAINED = {"attn_implementation", "device_map", "max_memory", "low_cpu_mem_usage", "use_safetensors", "variant",
                   "cache_dir", "token", "local_files_only", "load_in_8bit", "load_in_4bit", "bnb_4bit_compute_dtype",
                   "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}  # fmt: skip
# What records, and so pareto.py, call a task's data set; other tasks keep their names
DATA_SETS = {"tiny_wmdp_bio": "wmdp_bio", "tiny_mmlu": "mmlu", "sae_mmlu_saebench": "mmlu",
             "tiny_openwebtext": "openwebtext", "sae_openwebtext": "openwebtext"}  # fmt: skip

# %% [markdown]
# ## The model: lm-eval's `hf` with the edit of common.py on its decoder layers


# %%
class AblatedLM(HFLM):
    """lm-eval's `hf`, all of its arguments, and SAE features that are ablated in every forward pass.

    pretrained: preset, hub id or folder. sae: folder or RELEASE:ID, with "{layer}" where there are several layers, or
    {layer: loaded SAE} (default: the preset's). features: {layer: ids}, a list of ids of `layer`, or a JSON file of
    either or a record. clamp: 0 or negative. With no features every log-likelihood is `hf`'s to the last bit. Set
    `ablated` to False to run the model as it is. Raises UserError for features and SAEs that do not fit.
    """

    def __init__(self, pretrained: str, sae=None, features=(), layer: int = 7, clamp=0.0, device=None, **kwargs):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")  # lm-eval takes cuda even without one
        path = model_source(pretrained)
        super().__init__(path, device=device, **kwargs)
        if hasattr(self, "accelerator"):  # lm-eval knows of several processes on GPUs only, and of one machine
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        # what the answers come from: content or commit of all that was loaded, and all arguments that may matter
        loaded = {name: kwargs[name] for name in ("peft", "delta", "tokenizer") if isinstance(kwargs.get(name), str)}
        self.identity = {name: identity(source) for name, source in {"model": path, **loaded}.items()}
        if "revision" in kwargs:
            commit = getattr(self.model.config, "_commit_hash", None)
            self.identity["revision"] = f"{kwargs['revision']}@{commit}"
        self.arguments = {name: str(kwargs[name]) for name in sorted(kwargs) if name not in BATCHING}
        if isinstance(features, str):
            features = read_features(features, layer, sae, pretrained)
        elif not isinstance(features, dict):
            features = {layer: list(features)} if features else {}
        if not isinstance(sae, dict):
            sae = load_saes(self, sae, list(features), pretrained)
        self.ablated = True
        self.set_edits(sae, features, float(clamp))

    def set_edits(self, saes: dict, features: dict[int, list[int]], clamp: float) -> None:
        """Ablate these features, {layer: ids}, from now on. Raises UserError for features that the SAE lacks."""
        if not -math.inf < clamp <= 0:
            raise UserError(f"clamp {clamp:g}: a number that is 0 or negative")
        layers, self.edits = decoder_layers(self.model), []  # [(layer, its module, the features' latents, clamp)]
        for number, ids in features.items():
            try:
                latents = checked(saes[number], ids, clamp)
            except ValueError as error:
                raise UserError(f"layer {number}: {error}") from error
            self.edits.append((number, layers[layer_of(saes[number])], latents, clamp))

    @contextmanager
    def patched(self):
        """Within this context the model's layers have the edit; RuntimeError if one of them never ran."""
        fired = set()

        def edit(number, latents, clamp):
            def hook(module, args, output):  # transformers 5 returns h, earlier versions (h, ...)
                fired.add(number)
                h = output[0] if isinstance(output, tuple) else output
                new = edited(h, latents, clamp, seen["edited"])
                return new if new is None or not isinstance(output, tuple) else (new, *output[1:])

            return hook

        edits = self.edits if self.ablated else []
        with watch_tokens(self.model, self.tokenizer) as seen, ExitStack() as handles:
            handles.callback(self.model.get_output_embeddings().register_forward_hook(self.refuse_not_finite).remove)
            for number, module, latents, clamp in edits:
                handles.callback(module.register_forward_hook(edit(number, latents, clamp)).remove)
            yield
        if len(fired) != len(edits):
            raise RuntimeError("a layer that features are ablated at never ran")

    def refuse_not_finite(self, module, args, logits):
        """A hook on the unembedding: an argmax over NaN would be an answer like any other, and go into the caches."""
        if not all(torch.isfinite(end) for end in logits.aminmax()):
            how = "with the features ablated" if self.ablated and self.edits else "as it is"
            raise UserError(f"{self.pretrained} {how} has logits that are not finite (NaN or infinity): look for such "
                            "values in its weights, its adapter and its SAE, or take another dtype")  # fmt: skip

    def _model_call(self, *args, **kwargs):
        with self.patched():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args, **kwargs):
        with self.patched():
            return super()._model_generate(*args, **kwargs)

    def fingerprint(self) -> str:
        """Hash of what decides the answers: what model, adapter and SAEs are (hub.identity), arguments, edits."""
        model = [self.identity, self.arguments, self.model.config._attn_implementation, str(self.model.dtype)]
        edits = [(number, clamp, latents.features.tolist(), latents.sae.identity)
                 for number, _, latents, clamp in (self.edits if self.ablated else [])]  # fmt: skip
        return hashlib.sha256(json.dumps([model, edits]).encode()).hexdigest()[:16]

    def set_cache_hook(self, cache_hook) -> None:
        """lm-eval's cache knows a request, not the model that answered it: another model's cache is refused."""
        known, mine = cache_hook.dbdict, self.fingerprint()
        if len(known) and known.get("sae-ablated") != mine:
            raise UserError("these cached answers are another model's or another ablation's: give another cache")
        known["sae-ablated"] = mine
        super().set_cache_hook(cache_hook)

    def _loglikelihood_tokens(self, requests, **kwargs):
        asked = [(key, context, answer) for key, context, answer in requests if key is not None]  # None: rolling, which
        check_bos(self.tokenizer, [context for _, context, _ in asked])  # lm-eval cuts in windows, with two BOS itself
        for (text, _), context, answer in asked:
            without_thought(text)
            self.refuse_long(text, len(context) + len(answer) - 1)
        return super()._loglikelihood_tokens(requests, **kwargs)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:  # what is left of the context when all new tokens are written
            self.refuse_long(max(strings, key=len), ids.shape[1], left_truncate_len)
        return ids, mask

    def refuse_long(self, text: str, length: int, most: int | None = None) -> None:
        """lm-eval would cut a prompt's beginning off, or ask the model about positions that it does not have."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or self.max_length
        most = most or min(self.max_length, positions)
        if length > most:
            raise UserError(f"the prompt {text[:60]!r} ... has {length} tokens, and there is room for {most}: leave it "
                            "out with --samples, or ask with fewer examples")  # fmt: skip


if "sae-ablated" not in model_registry:  # lm-eval refuses a name twice, but a notebook's cell is run again
    register_model("sae-ablated")(AblatedLM)


class Scored:
    """What common.load_sae and picking.py ask of a TransformerLens model, of the very model that lm-eval scores."""

    def __init__(self, lm: AblatedLM):
        config, layers = lm.model.config.get_text_config(), decoder_layers(lm.model)
        self.original_model, self.tokenizer, self.blocks = lm.model, lm.tokenizer, layers
        self.cfg = SimpleNamespace(n_layers=len(layers), d_model=config.hidden_size, d_vocab=config.vocab_size,
                                   model_name=lm.pretrained, device=lm.device)  # fmt: skip
        self.hook_dict = {f"blocks.{i}.hook_resid_post": layer for i, layer in enumerate(layers)}

    @contextmanager
    def hooks(self, fwd_hooks: list):
        with ExitStack() as handles:
            for name, hook in fwd_hooks:

                def read(module, args, output, hook=hook):
                    hook(output[0] if isinstance(output, tuple) else output, hook=None)

                handles.callback(self.hook_dict[name].register_forward_hook(read).remove)
            yield

    def __call__(self, ids, stop_at_layer: int, use_cache: bool = False) -> None:
        """Run the layers below `stop_at_layer`, for the sake of the hooks."""

        class Stop(Exception):
            pass

        def stop(module, args):
            raise Stop

        above = [*self.blocks, self.original_model.get_output_embeddings()][stop_at_layer]
        handle = above.register_forward_pre_hook(stop)
        with suppress(Stop):
            self.original_model(ids, use_cache=use_cache)
        handle.remove()


def load_saes(lm: AblatedLM, sae: str | None, layers: list[int], model: str) -> dict:
    """{layer: SAE}. sae: --sae, with {layer} in the layer's place; None: the preset's."""
    if sae and len(layers) > 1 and "{layer}" not in sae:
        raise UserError(f"--sae {sae}: with several layers it needs {{layer}} in the layer's place")
    view = Scored(lm)
    return {number: load_sae(sae and sae.replace("{layer}", str(number)), number, view, model) for number in layers}


# %% [markdown]
# ## Features from a file


# %%
def read_json(path: str):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def read_features(path: str, layer: int, sae: str | None = None, model: str = "tiny") -> dict[int, list[int]]:
    """{layer: ids} from a JSON file: a list of ids, {layer: ids}, or a record (see `of_record`).

    Raises UserError for a layer without features, and for a record whose SAE is not `sae` as it is now.
    """
    found = read_json(path)
    if isinstance(found, dict) and "points" in found:
        return features_of(path, found, of_record(path, found), sae, model)
    found = {layer: found} if isinstance(found, list) else found
    try:
        features = {int(number): ids for number, ids in found.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: a list of feature ids, {{layer: ids}} or a record is wanted") from error
    return filled(path, features)


def filled(path: str, features: dict) -> dict[int, list[int]]:
    """The features, unless a layer has none: with nothing to ablate they would be picked, or the model scored as is."""
    for number, ids in features.items():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise UserError(f"{path}: layer {number} has no list of feature ids")
    if not features or not all(features.values()):
        empty = f"layer {min(k for k, ids in features.items() if not ids)} has" if features else "it holds"
        raise UserError(f"{path}: {empty} no features to ablate")
    return features


def features_of(path: str, record: dict, setting: dict, sae: str | None, model: str) -> dict[int, list[int]]:
    """{layer: ids} of a record's setting, which another SAE does not know under these ids."""
    ids = setting["features"]
    features = {int(k): v for k, v in ids.items()} if isinstance(ids, dict) else {setting["layer"]: ids}
    for number in filled(path, features):
        source = sae_source(sae and sae.replace("{layer}", str(number)), number, model)
        check_same(path, record, "sae", source, number)
    return features


def of_record(path: str, record: dict, **wanted) -> dict:
    """The setting of a record's SAE ablation that has the wanted layer, n_features and clamp (None: any).

    Where lessons left both zero ablation and a clamp the clamp is meant. Raises UserError if not one setting is left.
    """
    settings_of = [
        {"layer": record["layer"], **p["setting"]} for p in record["points"] if p["method"] == "sae-ablation"
    ]
    left = [s for s in settings_of if all(v is None or s[k] == v for k, v in wanted.items())]
    if wanted.get("clamp") is None and len({json.dumps([s["layer"], s["features"]]) for s in left}) == 1:
        left = [min(left, key=lambda s: s["clamp"])]
    if len(left) != 1:
        there = ", ".join(f"--layer {s['layer']} --n-features {s['n_features']} --clamp {s['clamp']:g}"
                          for s in (left or settings_of)[:40])  # fmt: skip
        raise UserError(f"{path}: say which of its settings: {there or 'it has no SAE ablation'}")
    return left[0]


# %% [markdown]
# ## Flags: the shared ones, some with other defaults, and lm-eval's own, in its spelling or with hyphens

# %%
flags = parser(__doc__, without=("--max-rows", "--skip-long"))


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
flags.add_argument(
    "--features", metavar="FILE", help="JSON list of ids, {layer: ids}, or a record (default: pick them)"
)
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


# %% [markdown]
# ## Answers: on several processes each has its share of the requests


# %%
class Spread(LM):
    """A model whose requests are shared out over the processes; every process gets all answers, in order.

    lm-eval's own way deals out documents, and fails where a task has fewer of them than there are processes.
    """

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def share(self, name: str, requests: list) -> list:
        contexts = [request.args[0] or str(request.args) for request in requests]  # a question's letters share one
        numbers = {context: i for i, context in enumerate(dict.fromkeys(contexts))}
        mine = set(processes.own(range(len(numbers))))
        own = [i for i, context in enumerate(contexts) if numbers[context] in mine]
        answers = getattr(self.inner, name)([requests[i] for i in own]) if own else []
        found = dict(processes.from_all(list(zip(own, answers))))
        return [found[i] for i in range(len(requests))]

    def loglikelihood(self, requests):
        return self.share("loglikelihood", requests)

    def loglikelihood_rolling(self, requests):
        return self.share("loglikelihood_rolling", requests)

    def generate_until(self, requests):
        return self.share("generate_until", requests)

    def apply_chat_template(self, *args, **kwargs):
        return self.inner.apply_chat_template(*args, **kwargs)

    def chat_template(self, *args, **kwargs):
        return self.inner.chat_template(*args, **kwargs)

    @property
    def tokenizer_name(self):
        return self.inner.tokenizer_name

    def __getattr__(self, name):
        return getattr(self.inner, name)


def model_args(s) -> dict:
    """lm-eval's --model_args. Raises UserError for a name given twice, unknown, or that a flag of ours settles."""
    entries = [entry for entry in (s.model_args or "").split(",") if entry]
    names = [entry.split("=")[0].strip() for entry in entries]
    known = {*inspect.signature(HFLM.__init__).parameters, *FROM_PRETRAINED} - {"self", "kwargs", *OURS}
    for entry, name in zip(entries, names):
        if name in OURS:
            raise UserError(f"--model_args {entry}: say it with {OURS[name]}")
        if names.count(name) > 1 or "=" not in entry:
            raise UserError(f"--model_args {s.model_args}: " + (f"{name} stands there twice" if "=" in entry else
                                                                f"{name} has no value, as in {name}=..."))  # fmt: skip
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.6)
            raise UserError(f"--model_args {entry}: lm-eval's hf has no {name}; near: {', '.join(near) or '-'}")
    more = simple_parse_args_string(s.model_args)
    if more.get("trust_remote_code"):
        raise UserError("--model_args trust_remote_code=True: code from a repository is never run here")
    if s.device_map and {"parallelize", "device_map"} & set(more):
        raise UserError("--model_args and --device-map both say where the layers go: leave one out")
    return more


def load_ablated(s) -> AblatedLM:
    """The model that is scored, nothing ablated yet. lm-eval sees one process: `Spread` deals with the others."""
    more = {"attn_implementation": "eager", **model_args(s)}  # as TransformerLens has it
    if s.device_map and torch.cuda.is_available():
        more |= {"parallelize": True, "device_map": s.device_map}
    if s.device_map and (s.device or processes.count() > 1):
        raise UserError("--device-map spreads one model over the GPUs: leave out --device and accelerate launch")
    path = model_source(s.model)
    if not Path(path).is_dir() and "/" not in path:
        raise UserError(f"no model {s.model!r}: give a preset ({', '.join(PRESETS)}), a hub id ORG/NAME or a folder")
    if Path(path).is_dir():
        refuse_damaged(path)
    else:
        announce(path)
    try:
        lm = AblatedLM(s.model, device=s.device, dtype=s.dtype, batch_size=s.batch_size,
                       max_batch_size=s.max_batch_size, **more)  # fmt: skip
    except (OSError, ValueError, ImportError, TypeError, AssertionError, SafetensorError) as error:
        hint = "" if Path(path).is_dir() else (f". If it is gated, accept its licence at https://huggingface.co/{path} "
                                               "and run `hf auth login`; to work offline use --model tiny")  # fmt: skip
        given = f" with --model_args {s.model_args}" if s.model_args else ""
        raise UserError(f"cannot load {path}{given}: {first_line(error)}{hint}") from error
    refuse_not_finite(path, lm.model.named_parameters())
    lm.tokenizer.edit_special = s.edit_special
    lm._rank, lm._world_size = 0, 1
    return lm


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
        right = [(name, i) for name, twin in twins.items() if found
                 for i, row in zip(asked[name], logged(found, [twin]), strict=True) if row["acc"] == 1.0]  # fmt: skip
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
# ## Scores: what lm-eval logged for each question, paired


# %%
def logged(results: dict, tasks: list) -> list[dict]:
    """The logged documents of several tasks in one list, by task and document, each once."""
    out = []
    for task in tasks:
        rows = results["samples"].get(task.task_name, [])
        out += sorted((row for row in rows if row["filter"] == rows[0]["filter"]), key=lambda row: row["doc_id"])
    return out


def answer(row: dict) -> str:
    """The letter of the choice of largest log-likelihood; "-" where a task does not choose among up to 26."""
    choices = row["filtered_resps"]
    if not 2 <= len(choices) <= 26 or isinstance(choices[0], str):
        return "-"
    return chr(ord("A") + max(range(len(choices)), key=lambda i: choices[i][0]))


def by_question(rows: list[dict]) -> dict:
    """{"metric": name, "value", "answers", "subject"}: the latter three have an entry for each question; one that is
    asked in several orders is right if all are. The metric is acc, or else the first that is a number."""
    names = [name for name in rows[0]["metrics"] if isinstance(rows[0][name], (int, float))]
    if not names:
        return {}
    metric, groups = "acc" if "acc" in names else names[0], {}
    for position, row in enumerate(rows):
        groups.setdefault(row["doc"]["number"] if "all_orders" in row["metrics"] else position, []).append(row)
    return {
        "metric": metric,
        "value": np.array([min(float(row[metric]) for row in group) for group in groups.values()]),
        "answers": np.array([answer(group[0]) for group in groups.values()]),
        "subject": np.array([str(group[0]["doc"].get("subject")) for group in groups.values()]),
    }


def quiz_score(now: dict, clean: dict | None, chance: float) -> dict:
    """Score of right and wrong answers, as evaluation.quiz_scores has it, with its subjects where there are several."""

    def score(mask):
        before = clean and clean["value"][mask].astype(bool)
        return accuracy_score(now["value"][mask].astype(bool), "".join(now["answers"][mask]), before, chance)

    whole, names = score(slice(None)), sorted(set(now["subject"]))
    subjects = {name: score(now["subject"] == name) for name in names}
    return {**whole, "subjects": with_q_values(subjects)} if len(names) > 1 else whole


def mean_score(now: dict, clean: dict | None, seed: int) -> dict:
    """Score of a metric that is neither right nor wrong: its mean over documents and the paired change."""
    score = {"metric": now["metric"], "mean": now["value"].mean().item(), "n": len(now["value"])}
    if clean:
        change = now["value"] - clean["value"]
        score["change"], (low, high) = change.mean().item(), bootstrap(np.mean, change, seed=seed)
        score |= {"change_low": low, "change_high": high}
    return score


def scores_of(runs: list[list[dict]], lm: AblatedLM, seed: int) -> list[dict | None]:
    """One score per run (unablated first, if it was run) from its logged documents; None where lm-eval has no number
    for each document."""
    first = runs[0][0]
    if "bits_per_byte" in first["metrics"] and "document" in first["doc"]:
        nats = torch.tensor([[-row["bits_per_byte"][0] for row in rows] for rows in runs], dtype=torch.float64)
        windows = [lm.tok_encode(row["doc"]["text"], add_special_tokens=False) for row in runs[0]]
        documents = [row["doc"]["document"] for row in runs[0]]
        return loss_scores(nats, torch.tensor([len(ids) for ids in windows]), documents, seed)
    tables = [by_question(rows) for rows in runs]
    if not tables[0]:
        return [None] * len(runs)
    pairs = [(table, tables[0] if k else None) for k, table in enumerate(tables)]
    if not all(set(table["value"]) <= {0.0, 1.0} for table in tables):
        return [mean_score(now, clean, seed) for now, clean in pairs]
    choices = len(first["filtered_resps"])
    chance = (1 / choices if choices > 1 else 0.0) ** (24 if "all_orders" in first["metrics"] else 1)
    return [quiz_score(now, clean, chance) for now, clean in pairs]


# %% [markdown]
# ## The run: features, tasks, answers, scores


# %%
def layers_of(s, given: dict) -> dict[int, list[int]] | None:
    """{layer: features} of --features, None where they are to be picked. A record also settles what else is its own:
    SAE, clamp, data, seed, and whether all questions may be scored."""
    if s.features is None:
        return None
    s.pick_on = "all"  # of a bare list nobody knows what it was picked on
    record = read_json(s.features)
    if not (isinstance(record, dict) and "points" in record):
        return read_features(s.features, s.layer)
    if record["model"] != s.model:
        raise UserError(f"{s.features} is a record of {record['model']}, the model is {s.model}")
    check_same(s.features, record, "model", model_source(s.model))
    setting = of_record(s.features, record, **given)
    saes, there = record["sae"], record["layer"]
    if s.sae is None and not isinstance(setting["features"], dict):
        source = saes[there.index(setting["layer"])] if isinstance(saes, list) else saes
        s.sae = str(HERE / source) if (HERE / source).is_dir() else source
    s.seed, s.pick_on, s.clamp = record["seed"], record["settings"]["pick_on"], setting["clamp"]
    s.data = s.data or record["settings"]["data"]
    return features_of(s.features, record, setting, s.sae, s.model)


def pick(lm: Scored, sae, forget_windows: list, retain_windows: list, s, batch_size: int) -> list[int]:
    """As many features as --n-features, as in the lessons."""
    forget = firing_rates(lm, sae, forget_windows, batch_size, "forget rates")
    retain = largest([firing_rates(lm, sae, part, batch_size, "retain rates") for part in retain_windows])
    features = pick_features(forget, retain, s.n_features, s.pick)
    print_features(features, forget, retain, top_tokens(lm, sae, features, forget_windows), sae)
    return features


def prepare(lm: AblatedLM, s, features: dict | None, sources: dict) -> tuple[dict, dict, dict]:
    """The SAE check and picking, on the model that is scored. Returns {layer: features}, {layer: what the check found}
    and {layer: SAE}."""
    saes, view = load_saes(lm, s.sae, list(features or [s.layer]), s.model), Scored(lm)
    noted = {}
    wmdp, noted["wmdp_bio"] = load_rows("wmdp_bio", s.model, s.data)
    forget, retain = picking_texts(wmdp, halves(wmdp, s.seed, s.pick_on)[0], s, noted)
    sources |= {name: found for name, found in noted.items() if name == "wikitext" or not features}
    retain_windows = [token_windows(lm.tokenizer, texts, s.context, RETAIN_TOKENS)[0] for texts in retain]
    sanity = {number: sanity_gate(view, sae, retain_windows[0], not s.no_sanity) for number, sae in saes.items()}
    if not features:
        forget_windows, _ = token_windows(lm.tokenizer, forget, s.context)
        batch_size = s.batch_size if isinstance(s.batch_size, int) else 16
        features = {s.layer: pick(view, saes[s.layer], forget_windows, retain_windows, s, batch_size)}
    return features, sanity, saes


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
    return {**found, "task": name, "questions": asked}


def points_of(rows: list[Ablation], scores: dict, features: dict, s) -> list[dict]:
    """Record entries, one per run. The setting of several layers has them joined by + and features by layer."""
    points = [row.point(**{name: values[k] for name, values in scores.items()}) for k, row in enumerate(rows)]
    for point in points:
        if point["setting"]:
            point["setting"]["layer"] = s.layer
            if len(features) > 1:
                point["setting"]["features"] = features
    return points


def show(rows: list[Ablation], scores: dict, sources: dict, runs: dict) -> None:
    """Print a table for every data set; lm-eval's own where it logs no number for each document."""
    for name, values in scores.items():
        title = title_of(name, sources)
        if values[0] is None:
            for run_name, results in runs.items():
                print(f"\n{title}, {run_name}, lm-eval's own table\n\n{make_table(results)}")
        elif "accuracy" in values[0]:
            print_quiz(title, rows, values)
        elif "nats_per_token" in values[0]:
            print_loss(title, rows, values)
        else:
            print(f"\n{title}: n {values[0]['n']}, {values[0]['metric']}\n")
            for row, value in zip(rows, values):
                change = "change {change:+.4f} [{change_low:+.4f}, {change_high:+.4f}]"
                change = change if value.get("change_low") is not None else ""
                print(f"  {label(row):34}{value['mean']:.4f}  {change.format(**value)}")


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
    features = layers_of(s, given)
    if features:
        s.layer = next(iter(features)) if len(features) == 1 else "+".join(map(str, features))
        s.n_features = sum(map(len, features.values()))
    path = outputs("lm_eval_ablated.py", s, flags)
    tasks = find_tasks(s)
    chosen = choose(tasks, s, s.pick_on == "half")
    lm = load_ablated(s)
    features, sanity, saes = prepare(lm, s, features, sources)
    lm.set_edits(saes, features, s.clamp)
    if s.robust:
        chosen = keep_robust(lm, tasks, chosen, s)
    runs = {name: ask(lm, tasks, chosen, s, name == "ablated")
            for name in (["unablated"] if s.unablated else []) + ["ablated"]}  # fmt: skip
    if not processes.is_first():
        return {}

    ablated = Ablation("sae-ablation", tuple(itertools.chain(*features.values())), s.clamp)
    rows = [Ablation("none"), ablated] if s.unablated else [ablated]
    scores = {}
    for name, (_, parts) in tasks.items():
        short = name_in_record(name, list(tasks))
        sources[short] = source_of(name, parts, chosen, s)
        scores[short] = scores_of([logged(results, parts) for results in runs.values()], lm, s.seed)
    show(rows, scores, sources, runs)
    points, one_sae = points_of(rows, scores, features, s), next(iter(saes.values()))
    record = make_record("lm_eval_ablated.py", s, one_sae, sources, sanity, points, time.time() - started)
    record["versions"]["lm_eval"] = version("lm_eval")
    record["identity"] |= lm.identity
    if len(saes) > 1:
        several = {"layer": list(saes), "sae": [x.source for x in saes.values()]}
        record |= several | {"hook_point": [x.hook_point for x in saes.values()]}
        record["identity"]["sae"] = [x.identity for x in saes.values()]
    record["attention"] = lm.model.config._attn_implementation
    record["lm_eval"] = {
        name: json.loads(json.dumps(results["results"], default=str)) for name, results in runs.items()
    }
    quizzes = {title_of(name, sources): values for name, values in scores.items() if values and "accuracy" in values[0]}
    title = f"{short_name(s.model)}, layer {s.layer}: {s.n_features} features ablated, lm-eval"
    write_record(path, record, {"accuracy": lambda: quiz_figure(quizzes, rows, title)} if quizzes else {})
    return record


# %%
if __name__ == "__main__":
    command_line(run, flags)
