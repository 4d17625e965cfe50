"""
lm-eval's `hf` with an edit of the residual stream in every forward pass, where the edit comes from (a list of features,
a file of them, or a record), and scores of what lm-eval has logged.
"""

import difflib
import hashlib
import inspect
import json
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from safetensors import SafetensorError

import hub
import processes
from common import load_sae
from data import LETTERS, UserError, check_bos, first_line, pad_id, without_thought
from edits import METHODS, NONE, Edit, applied, decoder_layers, edit_of
from evaluation import accuracy_score, loss_scores, mean_score, with_q_values
from hub import check_same, identity, model_source, refuse_not_finite, sae_source

BATCHING = {"batch_size", "max_batch_size"}  # do not decide an answer
# The numbers by which methods are told what to do, as edits.py names them
NUMBERS = {"threshold", "gate", "strength", "refusal", "refusal_value"}
# Of --model_args: what flags of ours settle, and what hf hands on to transformers' from_pretrained
OURS = {"pretrained": "--model", "sae": "--sae", "features": "--features", "layer": "--layer", "clamp": "--clamp",
        "method": "--method", **dict.fromkeys(sorted(NUMBERS), "--setting"),
        "device": "--device", "dtype": "--dtype", "batch_size": "--batch_size",
        "max_batch_size": "--max_batch_size"}  # fmt: skip
FROM_PRETRAINED = {"attn_implementation", "device_map", "max_memory", "low_cpu_mem_usage", "use_safetensors", "variant",
                   "cache_dir", "token", "local_files_only", "load_in_8bit", "load_in_4bit", "bnb_4bit_compute_dtype",
                   "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}  # fmt: skip


class AblatedLM(HFLM):
    """lm-eval's `hf`, all of its arguments, and an edit that is on in every forward pass.

    pretrained: preset, hub id or folder. sae: folder or RELEASE:ID, with "{layer}" where there are several layers, or
    {layer: loaded SAE} (default: the preset's). features: {layer: ids}, a list of ids of `layer`, or a JSON file of
    either or a record, whose edit is taken as it is. method: of edits.METHODS (None: sae-ablation, or the record's);
    clamp (None: 0, or the record's), threshold, gate, strength, refusal, refusal_value: what the method takes. With no
    features every log-likelihood is `hf`'s to the last bit. Set `ablated` to False to run the model as it is. Raises
    UserError for features and SAEs that do not fit.
    """

    def __init__(
        self, pretrained: str, sae=None, features=(), layer: int = 7, clamp=None, method=None, device=None, **kwargs
    ):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")  # lm-eval takes cuda even without one
        numbers = {name: kwargs.pop(name) for name in NUMBERS & set(kwargs)}
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
        self.ablated = True
        self.set_edit(NONE)
        if isinstance(features, str):
            wanted = {"method": method, "clamp": clamp, **numbers}
            point = from_file(features, layer, wanted, sae, pretrained)
        else:
            features = features if isinstance(features, dict) else {layer: list(features)} if features else {}
            point = point_of(features, method, clamp, numbers)
        saes = sae if isinstance(sae, dict) else load_saes(self, sae, list(features_of(point)), pretrained)
        self.set_edit(edit_from(point, saes), saes)

    def set_edit(self, edit: Edit, saes: dict | None = None) -> None:
        """Have this edit on from now on; saes: {layer: SAE}, those that it was made from."""
        self.edit, self.saes = edit, saes or {}

    @contextmanager
    def patched(self):
        """Within this context the edit is on; RuntimeError if one of its layers never ran."""
        edit = self.edit if self.ablated else NONE
        with applied(self.model, self.tokenizer, edit), ExitStack() as handles:
            handles.callback(self.model.get_output_embeddings().register_forward_hook(self.refuse_not_finite).remove)
            yield

    def refuse_not_finite(self, module, args, logits):
        """A hook on the unembedding: an argmax over NaN would be an answer like any other, and go into the caches."""
        if not all(torch.isfinite(end) for end in logits.aminmax()):
            how = f"under {self.edit.method}" if self.ablated and self.edit.at else "as it is"
            raise UserError(f"{self.pretrained} {how} has logits that are not finite (NaN or infinity): look for such "
                            "values in its weights, its adapter and its SAE, or take another dtype")  # fmt: skip

    def _model_call(self, *args, **kwargs):
        with self.patched():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args, **kwargs):
        if self.ablated and self.edit.whole:
            raise UserError(f"{self.edit.method} looks at a whole prompt before it edits, so no answer can be written "
                            "under it: leave out tasks that generate")  # fmt: skip
        with self.patched():
            return super()._model_generate(*args, **kwargs)

    def fingerprint(self) -> str:
        """Hash of what decides the answers: what model, adapter and SAEs are (hub.identity), arguments, edits."""
        model = [self.identity, self.arguments, self.model.config._attn_implementation, str(self.model.dtype)]
        edit, saes = (self.edit, self.saes) if self.ablated and self.edit.at else (NONE, {})
        saes = {number: sae.identity for number, sae in saes.items()}
        special = getattr(self.tokenizer, "edit_special", None) if edit.at else None
        whole = [model, edit.method, list(edit.at), edit.setting, edit.arguments, saes, special]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

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
        alone = self.ablated and self.edit.whole and pad_id(self.tokenizer) != 0
        # lm-eval pads with token 0, which a share of tokens must not count
        with patch.object(self, "batch_size_per_gpu", 1) if alone else nullcontext():
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
    """What common.py and methods.py ask of a TransformerLens model, of the one that lm-eval scores."""

    def __init__(self, lm: AblatedLM):
        config, layers = lm.model.config.get_text_config(), decoder_layers(lm.model)
        self.original_model, self.tokenizer, self.blocks = lm.model, lm.tokenizer, layers
        self.cfg = SimpleNamespace(n_layers=len(layers), d_model=config.hidden_size, d_vocab=config.vocab_size,
                                   model_name=lm.pretrained, device=lm.device)  # fmt: skip
        self.hook_dict = {f"blocks.{i}.hook_resid_post": layer for i, layer in enumerate(layers)}


def load_saes(lm: AblatedLM, sae: str | None, layers: list[int], model: str) -> dict:
    """{layer: SAE}. sae: --sae, with {layer} in the layer's place; None: the preset's."""
    if sae and len(layers) > 1 and "{layer}" not in sae:
        raise UserError(f"--sae {sae}: with several layers it needs {{layer}} in the layer's place")
    view = Scored(lm)
    return {number: load_sae(sae and sae.replace("{layer}", str(number)), number, view, model) for number in layers}


# ------------------------------------------------------------------------------------- edits from a file


def read_json(path: str):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def point_of(features: dict, method: str | None, clamp: float | None, numbers: dict) -> dict:
    """{layer: ids} in the form of a record's point. Raises UserError for a number that the method does not take."""
    method = method or "sae-ablation"
    if strange := set(numbers) - set(inspect.signature(METHODS[method]).parameters):
        raise UserError(f"{method} takes no {min(strange)}")
    layer, ids = next(iter(features.items())) if len(features) == 1 else ("+".join(map(str, features)), features)
    setting = {"n_features": sum(map(len, features.values())), "clamp": clamp or 0.0, "features": ids, "layer": layer}
    return {"method": method, "setting": {**setting, **numbers}}


def from_file(path: str, layer: int, wanted: dict, sae: str | None = None, model: str = "tiny") -> dict:
    """What a JSON file says is to be applied, in the form of a record's point: a list of ids of `layer`, {layer: ids},
    or a record (see `of_record`); wanted: method, clamp and other numbers of it, None where nothing is said.

    Raises UserError for a layer without features, and for a record whose SAE is not `sae` as it is now.
    """
    found = read_json(path)
    if is_record(found):
        point = of_record(path, found, **wanted)
        for number in filled(path, features_of(point)) if point["method"] != "diff-in-means" else ():
            source = sae_source(sae and sae.replace("{layer}", str(number)), number, model)
            check_same(path, found, "sae", source, number)
        return point
    found = {layer: found} if isinstance(found, list) else found
    try:
        features = {int(number): ids for number, ids in found.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: a list of feature ids, {{layer: ids}} or a record is wanted") from error
    numbers = {name: value for name, value in wanted.items() if name not in ("method", "layer", "n_features", "clamp")}
    return point_of(filled(path, features), wanted.get("method"), wanted.get("clamp"), numbers)


def is_record(found) -> bool:
    return isinstance(found, dict) and "points" in found


def filled(path: str, features: dict) -> dict[int, list[int]]:
    """The features, unless a layer has none: with nothing to ablate they would be picked, or the model scored as is."""
    for number, ids in features.items():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise UserError(f"{path}: layer {number} has no list of feature ids")
    if not features or not all(features.values()):
        empty = f"layer {min(k for k, ids in features.items() if not ids)} has" if features else "it holds"
        raise UserError(f"{path}: {empty} no features to ablate")
    return features


def features_of(point: dict) -> dict[int, list[int]]:
    """{layer: ids} of a point, which another SAE does not know under these ids; {} for a method without features."""
    setting, edit = point["setting"], point.get("edit")
    ids = edit["arguments"].get("features", {}) if edit else setting["features"]
    return {int(k): v for k, v in ids.items()} if isinstance(ids, dict) else {setting["layer"]: ids}


def of_record(path: str, record: dict, method: str | None = None, **wanted) -> dict:
    """The point of a record that has the wanted method, layer, n_features, clamp and other numbers (None: any).

    Where nothing is said a tuned method's is the one that it chose, and where lessons left both zero ablation and a
    clamp the clamp is meant. Raises UserError if not one setting is left.
    """
    points = {i: {**point, "setting": {"layer": record["layer"], **point["setting"]}}
              for i, point in enumerate(record["points"])
              if "edit" in point or "features" in point["setting"]}  # fmt: skip
    usual, there = record.get("chosen"), [point["method"] for point in points.values()]
    if method is None and (usual in points or "sae-ablation" in there):
        method = points[usual]["method"] if usual in points else "sae-ablation"
    points = {i: point for i, point in points.items() if method in (None, point["method"])}
    left = {i: point for i, point in points.items()
            if all(value is None or point["setting"].get(name) == value for name, value in wanted.items())}  # fmt: skip
    if usual in left:
        return left[usual]
    if wanted.get("clamp") is None and len({json.dumps(features_of(point)) for point in left.values()}) == 1:
        return min(left.values(), key=lambda point: point["setting"].get("clamp", 0.0))
    if len(left) != 1:
        said = ", ".join(as_flags(point) for point in list((left or points).values())[:40])
        raise UserError(f"{path}: say which of its settings: {said or 'it holds no edit'}")
    return next(iter(left.values()))


def as_flags(point: dict) -> str:
    """A point's setting as the flags that tell it apart."""
    setting, parts = point["setting"], [] if point["method"] == "sae-ablation" else [f"--method {point['method']}"]
    for name, value in setting.items():
        if name in ("layer", "n_features", "clamp"):
            parts.append(f"--{name.replace('_', '-')} {value:g}")
        elif isinstance(value, int | float):
            parts.append(f"--setting {name}={value:g}")
    return " ".join(parts)


def edit_from(point: dict, saes: dict) -> Edit:
    """The edit of a record's point; saes: {layer: SAE} of its features. Raises UserError for features that an SAE
    lacks, and for a number that the method wants."""
    method, setting, at = point["method"], point["setting"], {}
    if edit := point.get("edit"):
        return edit_of(method, next(iter(saes.values()), None), setting, edit["layers"], **edit["arguments"])
    takes = set(inspect.signature(METHODS[method]).parameters) - {"features"}
    numbers = {name: value for name, value in setting.items() if name in takes}
    for number, ids in features_of(point).items():
        try:
            at |= edit_of(method, saes[number], features=ids, **numbers).at
        except (TypeError, ValueError) as error:
            raise UserError(f"layer {number}: {error}") from error
    return Edit(method, at, setting)


# ------------------------------------------------------------------------------------ several processes


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


# ------------------------------------------------------------------------------------------ loading


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
    path = hub.ready(s.model)
    try:
        lm = AblatedLM(s.model, device=s.device, dtype=s.dtype, batch_size=s.batch_size,
                       max_batch_size=s.max_batch_size, **more)  # fmt: skip
    except (OSError, ValueError, ImportError, TypeError, AssertionError, SafetensorError) as error:
        given = f" with --model_args {s.model_args}" if s.model_args else ""
        raise UserError(f"cannot load {path}{given}: {first_line(error)}{hub.gated(path)}") from error
    refuse_not_finite(path, lm.model.named_parameters())
    lm.tokenizer.edit_special = s.edit_special
    lm._rank, lm._world_size = 0, 1
    return lm


# ---------------------------------------------------- scores, of what lm-eval logged for each question, paired


def logged(results: dict, tasks: list) -> list[dict]:
    """The logged documents of several tasks in one list, by task and document, each once; where a task asks for a
    choice with its "choices"."""
    out = []
    for task in tasks:
        rows = results["samples"].get(task.task_name, [])
        rows = sorted((row for row in rows if row["filter"] == rows[0]["filter"]), key=lambda row: row["doc_id"])
        if task.OUTPUT_TYPE == "multiple_choice":
            rows = [{**row, "choices": task.doc_to_choice(row["doc"])} for row in rows]
        out += rows
    return out


def choices_of(row: dict) -> list:
    """What a question is answered by; what was asked may be more, as each choice without the question, too."""
    return row.get("choices", row["filtered_resps"])


def metric_of(row: dict) -> str | None:
    """The metric that a document is scored by here: acc, or else the first that is a number."""
    names = [name for name in row["metrics"] if isinstance(row[name], (int, float))]
    return "acc" if "acc" in names else next(iter(names), None)


def answer(row: dict) -> str:
    """The letter of the choice that the row's metric takes for the answer, as lm-eval's own process_results: the one of
    largest log-likelihood, by acc_norm per character; "-" where a task does not choose among up to 26."""
    choices, said = choices_of(row), row["filtered_resps"]
    if not 2 <= len(choices) <= 26 or isinstance(said[0], str):
        return "-"
    values, metric = np.array([value for value, _ in said]), metric_of(row)
    values, alone = values[: len(choices)], values[len(choices) :]
    if metric in ("acc_norm", "acc_bytes"):
        values = values / [len(choice if metric == "acc_norm" else choice.encode()) for choice in choices]
    elif metric == "acc_mutual_info":
        values = values - alone
    return chr(ord("A") + int(values.argmax()))


def letters_of(rows: list[dict]) -> dict:
    """{"letters_mass", "right_probability"} of questions that are answered by one of four letters, a value each, as
    evaluation.quiz_scores has them; {} where a task asks otherwise."""
    said = [[str(args[-1]).strip() for args in row.get("arguments", [])] for row in rows]
    if any(one != [*LETTERS] for one in said):
        return {}
    probability = np.exp([[choice[0] for choice in row["filtered_resps"]] for row in rows])
    right = [LETTERS.index(row["target"]) if row["target"] in [*LETTERS] else int(row["target"]) for row in rows]
    return {"letters_mass": probability.sum(1), "right_probability": probability[np.arange(len(rows)), right]}


def by_question(rows: list[dict]) -> dict:
    """{"metric": name, "value", "answers", "subject", what letters_of finds}: but for the name they have an entry for
    each question; one that is asked in several orders is right if all are. The metric is metric_of's."""
    metric, groups = metric_of(rows[0]), {}
    if metric is None:
        return {}
    for position, row in enumerate(rows):
        groups.setdefault(row["doc"]["number"] if "all_orders" in row["metrics"] else position, []).append(row)
    return {
        "metric": metric,
        "value": np.array([min(float(row[metric]) for row in group) for group in groups.values()]),
        "answers": np.array([answer(group[0]) for group in groups.values()]),
        "subject": np.array([str(group[0]["doc"].get("subject")) for group in groups.values()]),
        **(letters_of(rows) if len(groups) == len(rows) else {}),
    }


def quiz_score(now: dict, clean: dict | None, chance: float) -> dict:
    """Score of right and wrong answers, as evaluation.quiz_scores has it, with its subjects where there are several."""

    def score(mask):
        before = clean and clean["value"][mask].astype(bool)
        return accuracy_score(now["value"][mask].astype(bool), "".join(now["answers"][mask]), before, chance)

    whole, names = score(slice(None)), sorted(set(now["subject"]))
    for name in ("letters_mass", "right_probability"):
        if name in now:
            whole[name] = mean_score(now[name], clean and clean[name])
    subjects = {name: score(now["subject"] == name) for name in names}
    return {**whole, "subjects": with_q_values(subjects)} if len(names) > 1 else whole


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
        return [{"metric": now["metric"], "n": len(now["value"]),
                 **mean_score(now["value"], clean and clean["value"])} for now, clean in pairs]  # fmt: skip
    choices = len(choices_of(first))
    chance = (1 / choices if choices > 1 else 0.0) ** (24 if "all_orders" in first["metrics"] else 1)
    return [quiz_score(now, clean, chance) for now, clean in pairs]
