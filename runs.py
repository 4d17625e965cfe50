"""A run, from its command line to its record: flags, settings, what is kept on the way, where results go, how it ends.

Nothing here takes long to import, so that --help answers at once."""

import argparse
import atexit
import difflib
import hashlib
import io
import json
import math
import operator
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError

import data
import hub
from data import UserError, digest_of, first_line

with warnings.catch_warnings():  # notebooks have bars of text here, without widgets
    warnings.filterwarnings("ignore", "IProgress not found")
    import tqdm.auto  # noqa: F401 (it warns as it is imported)

FORM = 3  # of records and of what is cached: others are not read
PATIENCE = 10  # seconds that other processes give the first one to report a mistake that all of them met
# Settings that results do not depend on, but for rounding
FREE = ("out", "plot", "all", "batch_size", "device", "device_map", "no_sanity", "use_cache", "output_path",
        "log_samples")  # fmt: skip


def number(kind, wanted: str, holds=lambda x: True):
    """A type for add_argument: an int or float that is finite and for which `holds`; wanted: that in words."""

    def check(text):
        with suppress(ValueError, OverflowError):
            if math.isfinite(value := kind(text)) and holds(value):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")

    return check


natural_int = number(int, "an integer from 0 on", lambda x: x >= 0)
seed_int = number(int, "an integer from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63)  # more is none of torch's seeds
positive_int = number(int, "an integer from 1 on", lambda x: x >= 1)
finite_float = number(float, "a finite number")


def own_features(given: str) -> list[int] | dict[int, list[int]]:
    """Feature ids, or {layer: ids}: written out ("449,624"), or a file's. A file holds ids; JSON of either form; a list
    of Neuronpedia's, of objects with `layer` ("7-gemmascope-res-16k") and `index`; or a record, of which the chosen row
    counts, else the one of most features that are not random. Raises UserError for anything else."""
    is_file, shown = os.path.isfile(given), " ".join(given[:200].split())
    if not is_file and given.endswith((".json", ".txt")):
        raise UserError(f"{shown}: there is no such file of features")
    with data.in_a_line(f"{shown}: give ids as 449,624, or a file: of ids, a record or a list of Neuronpedia's"):
        text = Path(given).read_text(encoding="utf-8-sig") if is_file else given
        content = re.findall(r"\d+", text) if re.fullmatch(r"[\d\s,]+", text) else json.loads(text)
        if "rows" in content:
            rows = {name: row["settings"] for name, row in read_record(given)["rows"].items()
                    if "features" in row["settings"] and row["method"] != "random-features"}  # fmt: skip
            most = max(rows, key=lambda name: len(rows[name]["features"]), default="no row has features")
            if (name := content.get("chosen", most)) not in rows:
                raise UserError(f"{given}: it has no list of one layer's features ({name})")
            layers = {int(sae["hook_point"].split(".")[1]): sae["layer"] for sae in content.get("saes", ())}
            return {layers.get(at, at): rows[name]["features"] for at in rows[name]["layers"]}
        if isinstance(content, dict):
            content = content.get("features") or content.get("neurons") or content
        if isinstance(content, list) and content and isinstance(content[0], dict):
            layers = [int(re.match(r"\d+", str(one["layer"]))[0]) for one in content]
            content = {at: [one["index"] for one, layer in zip(content, layers) if layer == at] for at in layers}
        whole = lambda i: int(i) if isinstance(i, str) else operator.index(i)  # noqa: E731
        ids = partial(data.as_list, what="feature ids", kind=whole)
        found = ids(content) if isinstance(content, list) else {int(at): ids(some) for at, some in content.items()}
    if not found or (isinstance(found, dict) and not all(found.values())):
        raise UserError(f"{shown}: no features are there, or none of a layer")
    return found


def place(given: str) -> str:
    """A name as it is; a file or folder by the path that leads there from wherever a record is read."""
    return os.path.abspath(given) if given not in (*hub.PRESETS, "") and Path(given).exists() else given


class Parser(argparse.ArgumentParser):
    """Mistakes are UserErrors; -1e1 and -inf are numbers, which argparse takes for flags; sys.argv may be empty."""

    def __init__(self, **options):
        name, form = Path(*sys.argv[:1]).name, argparse.RawDescriptionHelpFormatter
        super().__init__(prog=name, formatter_class=form, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')} (see --help)")

    __deepcopy__ = lambda self, memo: self  # noqa: E731 (copies of settings share their flags)

    def __reduce__(self):
        raise UserError("settings cannot be pickled, as flags hold functions: pickle vars(args)")


def parser(doc: str, *, quiz: bool = False, controls: int = 0, without: tuple[str, ...] = ()) -> Parser:
    """The flags that scripts share, `without` some. quiz: also how it asks; controls: their default number, or 0."""
    title = doc.strip().removeprefix("# ")  # a notebook's heading
    group = p = Parser(description=title, usage="%(prog)s [flags]", conflict_handler="resolve", add_help=False)

    def add(name, help, **options):
        if name not in without:
            help += " (default: %(default)s)" * (options.get("default") is not None)
            group.add_argument(name, help=help, **options)

    add("--model", f"preset ({', '.join(hub.PRESETS)}), hub id or folder", type=place, default="tiny")
    add("--layer", "layer whose output the SAE reads; tiny has 3, 5, 7, 9, 15", type=natural_int, default=7)
    add("--n-features", f"how many to ablate (default: {hub.Preset.n_features}; of --features all)", type=positive_int)
    add("--clamp", "negative value that active features are set to (default: the preset's, else -100); of --features "
        "also a positive one, to amplify them", type=number(float, "a number other than 0", lambda x: x))  # fmt: skip
    if controls:
        add("--controls", "draws of random features, to compare with", type=positive_int, default=controls)
    add("--limit", "score only so many questions (a seeded sample) or documents of a data set", type=positive_int)
    add("--list", "show the presets: layers, widths and L0s of their SAEs", action="version", version=hub.listed())
    p.add_argument("-h", "--help", action="help", help="show this page")
    group = p.add_argument_group("model and SAE")
    add("--sae", "RELEASE:ID of SAELens's table, or a folder (default: the preset's SAE of --layer)", type=place)
    add("--dtype", "of the model (default: the preset's, else float32)", choices=["float32", "bfloat16"])
    add("--edit-special", "never: special tokens, chat markers among them, are not edited; all-but-bos: all tokens but "
        "the first are (SAEBench)", choices=["never", "all-but-bos"], default="never")  # fmt: skip
    add("--no-sanity", "go on even if the SAE does not fit the model", action="store_true")
    group = p.add_argument_group("picking")
    add("--pick", "rule: ratio (of firing rates), retain-threshold (SAEBench), dsg (Dynamic SAE Guardrails), "
        "attribution, output-score or measured (docs/methods.md); any-ratio also takes features that are no more "
        "frequent on the forget set, which the ratio leaves out", default="ratio")  # fmt: skip
    add("--features", "your own, in place of picking: ids as 449,624; or a file of ids, {layer: ids}, a record, or a "
        "list of Neuronpedia's", type=own_features)  # fmt: skip
    add("--pick-on", "half: pick on one half of the WMDP-Bio questions and score the other; all: pick and score on "
        "all, which flatters the scores", choices=["half", "all"], default="half")  # fmt: skip
    add("--pick-text", "prompt: questions as they are asked, against Wikitext and MMLU's development questions; prose: "
        "question and answer, against Wikitext", choices=["prompt", "prose"], default="prompt")  # fmt: skip
    add("--forget-corpus", "your copy of the WMDP-Bio forget corpus, to pick and train on in the questions' place: a "
        "hub id, or JSONL with a text in each line", type=place, metavar="FILE")  # fmt: skip
    add("--context", "tokens that rates are counted on at a time (SAEBench: 1024)", type=positive_int, default=128)
    group = p.add_argument_group("scoring")
    add("--data", "with any of wmdp_bio, wmdp_bio_robust, wmdp_bio_cloze, mmlu, mmlu_dev, wikitext, openwebtext, "
        "forget_corpus .jsonl", type=data.check_folder, metavar="FOLDER")  # fmt: skip
    add("--topic", "of the questions in WMDP-Bio's place: what tables call them, and what a question without a subject "
        "is asked about (default: of your own file its subject, else the folder's name)", metavar="NAME")  # fmt: skip
    if quiz:
        add("--prompt", "plain: lm-eval's template; chat: in a chat turn; saebench: in SAEBench's, answered after "
            "'Answer: ('", choices=["plain", "chat", "saebench"], default="plain")  # fmt: skip
        add("--wmdp", "in WMDP-Bio's place, also to pick on: robust, EleutherAI's 868 that their options do not give "
            "away; cloze, its 1,076 asked without options", choices=list(data.WMDP), default="all")  # fmt: skip
        add("--robust", "score only questions right in all 24 orders of their options", action="store_true")
        add("--subjects", "of MMLU, comma-separated (default: SAEBench's four where there, else all; lesson 1: all)")
    add("--skip-long", "leave out, and count, questions longer than the model's positions", action="store_true")
    add("--seed", "of the halves, control features and bootstrap", type=seed_int, default=0)
    group = p.add_argument_group("machine")
    add("--batch-size", "prompts in a pass; changes memory, results by rounding only", type=positive_int, default=16)
    add("--device", "cuda, cuda:1, mps or cpu (default: cuda if there is one; with accelerate launch, its choice)")
    add("--device-map", "spread a model over all GPUs", choices=["auto", "balanced", "sequential"])
    p.add_argument_group("output").add_argument("--out", help="record file, or its folder (default: results/)")
    return p


class settings(argparse.Namespace):  # called in a script's run(**changes)
    """What the flags come to: the parser's defaults with `changes` over them. `args.layer = 3` changes one more. Raises
    AttributeError for a name that no flag has, UserError for a value that the flag does not take."""

    __slots__ = ("flags", "started")  # beside the settings, which are what vars() gives

    def __init__(self, flags: Parser, changes: dict):
        self.flags, self.started = flags, time.time()
        vars(self).update(vars(flags.parse_args([])))
        for name, value in changes.items():
            setattr(self, name, value)

    def __setattr__(self, name, value):
        if name in self.__slots__ and not hasattr(self, name):  # here, and in a copy
            return object.__setattr__(self, name, value)
        if name not in vars(self):
            near = difflib.get_close_matches(name, vars(self), 3) or sorted(vars(self))
            raise AttributeError(f"no setting {name!r}; did you mean {', '.join(near)}?")
        flag = next(action for action in self.flags._actions if action.dest == name)
        first = flag.option_strings[:1]
        if (empty := isinstance(value, str) and not value) or (flag.nargs == 0 and type(value) is not bool):
            wanted = "nothing is given; leave it out, or say what" if empty else "True or False is wanted"
            raise UserError(f"{''.join(first) or name}: {wanted}")
        if flag.nargs != 0 and repr(value) != repr(flag.default):  # read as the command line would be: 7.0 is not 7
            value = json.dumps(value) if isinstance(value, dict) else value
            items = [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
            given = [*first, *items] if flag.nargs else ["=".join([*first, ",".join(items)])]
            value = getattr(self.flags.parse_args(given), name)
        vars(self)[name] = value


def help_before_imports(p: Parser, name: str) -> None:
    """Answer --help and --list of a script that runs as `name`, before it imports what takes seconds."""
    if name == "__main__" and {"-h", "--help", "--list"} & set(sys.argv[1:]):
        outlive_readers()
        p.parse_args()


def parse(p: Parser) -> settings:
    """The settings that the command line gives; in a notebook, where sys.argv is not ours, the defaults. From here on
    the run ends as `ended` says, and of several processes only the first prints. Raises UserError."""
    sys.excepthook, frame = ended, sys._getframe()
    outlive_readers()
    while frame.f_globals is globals():  # up to the script, which calls `parse` or `main`
        frame = frame.f_back
    script = frame.f_globals.get("__file__")  # a notebook's cell has none, whatever its kernel
    ours = script and [Path(path).name for path in sys.argv[:1]] == [Path(script).name]
    args = settings(p, vars(p.parse_args(None if ours else [])))
    if data.n_processes() > 1:
        atexit.register(data.process_state().destroy_process_group)
        sys.excepthook = ended  # torch.distributed puts its own in front as the processes connect
    if not data.is_first_process():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return args


def main(run, p: Parser) -> None:
    """Call run(**settings) with what the command line gives; else as `parse`."""
    run(**vars(parse(p)))


class Pipe(io.FileIO):
    """An output that is silent when nobody reads it any more: `script.py 2>&1 | head` still writes its record."""

    def write(self, content):
        with suppress(OSError):  # as of a full disk, to which a log is written
            return super().write(content)
        return len(content)


def outlive_readers() -> None:
    """Have standard output and error go on without readers, and without the characters that a console lacks."""
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            vars(sys)[name] = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        elif stream is getattr(sys, f"__{name}__"):
            stream.reconfigure(errors="backslashreplace")
            if not stream.isatty():
                pipe = io.BufferedWriter(Pipe(number, "w", closefd=False))
                buffered = stream.line_buffering or stream.write_through
                vars(sys)[name] = io.TextIOWrapper(pipe, stream.encoding, "backslashreplace", line_buffering=buffered)


def ended(kind, error, trace) -> None:
    """In place of sys.excepthook: a user's mistake is one line and exit code 2, of several processes the first one's;
    Ctrl-C is 130; anything else a traceback, of each process that it happens to."""
    to = sys.stderr if data.is_first_process() else sys.__stderr__  # `parse` silences the others
    if data.n_processes() > 1:
        atexit.unregister(data.process_state().destroy_process_group)  # the others may never come
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped" + f": {error}" * bool(str(error)), file=to)
        raise SystemExit(130)
    if data.ran_out(error):
        error = UserError(f"no memory is left ({first_line(error)}): --dtype bfloat16 takes half of what float32 does; "
                          "else take a smaller model, SAE or --batch-size")  # fmt: skip
    if not isinstance(error, UserError):
        return traceback.print_exception(kind, error, trace, file=to)
    if not data.is_first_process():
        time.sleep(PATIENCE)  # when the first one has failed, the launcher ends this one
    print(f"error: {error}", file=to)
    raise SystemExit(2)


def note_clamp(model: str, settings: dict) -> None:
    """Where no clamp is given, and none was chosen on the model, say which is taken and which sweep shows others."""
    preset, usual = hub.preset(model), {"wmdp": "all", "prompt": "plain", "seed": 0}
    clamps = settings.get("clamp", 0) is None and settings.get("method") in (None, "clamp")
    if preset.chosen or not clamps or settings.get("record") or "plot" in settings:  # pareto.py has three clamps
        return
    names = ("layer", "n_features", "features", "sae", "data", "topic", *usual)
    given = {name: value for name in names if (value := settings.get(name)) not in (None, usual.get(name))}
    if "features" not in given:
        given = {"n_features": preset.n_features} | given
    words = [f"--model {shlex.quote(model)}"]
    for name, value in given.items():
        value = json.dumps(value) if isinstance(value, dict) else value
        value = [str(value).strip("[]").replace(" ", "")] if name == "features" else value
        value = value if isinstance(value, list) else [value]
        words.append(f"--{'layers' if name == 'layer' else name.replace('_', '-')} {shlex.join(map(str, value))}")
    data.note_once(f"note: no clamp was chosen on {model}, so it is {preset.clamp:g}; to choose one: python pareto.py "
                   f"{' '.join(words)} --clamp -10 -30 -100 -300 -1000 -3000")  # fmt: skip


class Run:
    """A run of a script with the settings `args`, made when its data sets and SAEs are loaded. `key` is a hash of all
    that decides about results: the settings, what the model, its retrained twin, SAEs and data are, and `also` (JSON).
    model, dtype: where args has none. Raises UserError if nothing can be written to its place, and for a setting
    `layer`, `model` or `dtype` that is not that of the SAE and of the model it was loaded for."""

    def __init__(self, script: str, args, data=(), saes=(), also=(), model: str | None = None, dtype=None):
        self.script, self.saes, self.started = Path(script).name, saes, args.started
        self.data = [part for part in data if len(part)]
        self.model, self.settings = model or args.model, dict(vars(args))
        own, clamps = self.settings.get("features"), self.settings.get("clamp") or 0
        note_clamp(self.model, self.settings if saes else {})  # without SAEs nothing is clamped
        for name in ("clamp", "dtype", *(() if own else ("n_features",))):  # of one's own: all
            if name in self.settings and self.settings[name] is None:
                self.settings[name] = getattr(hub.preset(self.model), name)
        self.name, self.dtype = Path(self.model).name, dtype or self.settings["dtype"]
        models = {"model": self.model, "retrained": hub.preset(self.model).retrained}
        self.identity = {what: name and hub.identity(hub.preset(name).model) for what, name in models.items()}
        decides = {k: v for k, v in self.settings.items() if k not in FREE}
        self.key = digest_of([FORM, self.script, decides, self.dtype, self.identity, [sae.identity for sae in saes],
                              self.about(), also])  # fmt: skip
        method = self.settings.get("method")
        method = [method] if isinstance(method, str) and not self.settings.get("all") else []
        parts = [Path(script).stem, *method, self.name[:40]]
        for letter, name in (("L", "layer"), ("n", "n_features")):
            if (value := self.settings.get(name)) is not None:
                parts.append((letter + "-".join(map(str, value if isinstance(value, list) else [value])))[:40])
        out = Path(self.settings.get("out") or "results")
        self.path = out if out.suffix == ".json" else out / f"{'_'.join(parts)}_{self.key[:6]}.json"
        self.cache = self.path.with_suffix(".cache") / self.key[:16]
        refuse_unwritable(self.path)
        for loaded in {getattr(sae, "loaded_for", None) for sae in saes} - {None, (self.model, f"torch.{self.dtype}")}:
            raise UserError(f"settings say {self.model} in {self.dtype}, loaded is {' in '.join(loaded)}: load again")
        layers, said = [sae.layer for sae in saes], self.settings.get("layer")
        if len(layers) == 1 and isinstance(said, int) and said != layers[0]:
            raise UserError(f"the setting layer is {said}, and the SAE is layer {layers[0]}'s: load it again")
        if not own and (largest := max(clamps) if isinstance(clamps, list) else clamps) > 0:
            raise UserError(f"clamp {largest:g} amplifies features: for that give your own (features), not picked ones")

    def about(self) -> dict:
        """What a record says of the data; a tuning half has a name beside that of the half that is held out."""
        return {f"{part.name}/tuning" if part.half == "tuning" else part.name: part.about() for part in self.data}

    def cached(self, name: str, make):
        """make(), or what it returned in an earlier run of the same key that was stopped before it wrote its record:
        Measures, arrays and what JSON can hold, in lists and dicts (a tuple comes back as a list). All processes call
        make, and get the first one's value. Raises UserError for a damaged file."""
        path = self.cache / f"{quote(name, safe='')}.json"
        kept = path.read_text(encoding="utf-8", errors="replace") if data.is_first_process() and path.exists() else None
        if (kept := data.from_first_process(kept)) is None:
            try:
                text = data.from_first_process(json.dumps(make(), default=as_json))
            except KeyboardInterrupt:
                said = f"{len([*self.cache.glob('*')])} finished parts are kept; the same command goes on from there"
                raise KeyboardInterrupt(said) from None
            kept = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
            try:
                write_whole(path, lambda file: file.write_text(kept, encoding="utf-8"))
            except UserError as error:  # a full disk costs no result
                data.note_once(f"note: {error}; the run goes on, but once stopped it would start anew")
        seal, _, text = kept.partition("\n")
        if seal != hashlib.sha256(text.encode()).hexdigest():
            raise UserError(f"{path} is damaged: delete it, and start the run again")
        return json.loads(text, object_hook=from_json)

    def record(self, rows: dict, measures, **more) -> dict:
        """What `write` writes (docs/records.md). rows: {name: Edit, model or {"method", "settings"}}; more: entries."""
        groups = {m.name: (m.by_group(), m.q_values()) for m in measures if m.groups and m.answers}

        def known(score, **more):
            return {name: value for name, value in {**vars(score), **more}.items() if value is not None}

        def of_row(name, row):
            if not isinstance(row, dict):  # an Edit, or another model: the retrained one
                row = {"method": getattr(row, "method", "retrained"), "settings": getattr(row, "settings", {})}
            of = [m for m in measures if name in m.rows]
            answers = {m.name: m.answers[m.rows.index(name)] for m in of if m.answers}
            by_group = {what: {g: known(scores[name], q=q[g].get(name)) for g, scores in by_group.items()}
                        for what, (by_group, q) in groups.items() if what in answers}  # fmt: skip
            return {**row, "scores": {m.name: known(m[name]) for m in of}, "answers": answers, "groups": by_group}

        return {
            "form": FORM, "script": self.script, "command": " ".join([Path(*sys.argv[:1]).name, *sys.argv[1:]]),
            "seconds": round(time.time() - self.started, 1), "model": self.model, "dtype": self.dtype,
            "identity": dict(self.identity),
            "saes": [{"layer": sae.layer, "source": sae.source,
                      "identity": sae.identity, "hook_point": sae.hook_point} for sae in self.saes],
            "seed": self.settings.get("seed"), "settings": self.settings, "data": self.about(),
            "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens", "sae-lens")},
            "measures": {m.name: {"title": m.title, "unit": m.unit, "chance": m.chance} for m in measures},
            "rows": {name: of_row(name, row) for name, row in rows.items()}, **more}  # fmt: skip

    def write(self, rows: dict, measures, figures: dict | None = None, table="", **more) -> dict:
        """Write `record` as JSON and CSV, a table in Markdown, then figures as `draw_all` does, and print the record's
        path last. Where it cannot be written the record itself is printed, and UserError raised. Into a trained model's
        "folder", beside the record, goes a model card. Returns the record."""
        import pandas

        record, folder = self.record(rows, measures, **more), more.get("folder")
        if not data.is_first_process():
            return record
        try:
            if folder:
                folder = self.path.with_name(folder)
                write_whole(folder / "README.md", lambda file: file.write_text(model_card(record), encoding="utf-8"))
                record["identity"]["folder"] = hub.identity(str(folder))
            text = json.dumps(record, indent=1, allow_nan=False) + "\n"
            write_whole(self.path, lambda file: file.write_text(text, encoding="utf-8"))
        except UserError:
            print(f"record, to be saved as {self.path}:\n{json.dumps(record)}")
            raise
        lines = [{"row": name, "method": row["method"], "measure": of, "unit": record["measures"][of]["unit"], **score}
                 for name, row in record["rows"].items() for of, score in row["scores"].items()]  # fmt: skip
        write_whole(self.path.with_suffix(".csv"), lambda file: pandas.DataFrame(lines).to_csv(file, index=False))
        if table:
            path = self.path.with_suffix(".md")
            write_whole(path, lambda file: file.write_text(table + "\n", encoding="utf-8"))
            print(f"table: {path}")
        shutil.rmtree(self.cache, ignore_errors=True)
        with suppress(OSError):  # it is not there, or another run's, too
            self.cache.parent.rmdir()
        draw_all(self.path, figures or {})
        if folder:
            print(f"model: {folder}; to publish it: hf upload ORG/NAME {folder}")
        print(f"record: {self.path}")
        return record


def draw_all(beside: Path, figures: dict) -> None:
    """Write figures {suffix: a figure, or a function that draws it} beside a file. One that cannot be drawn (matplotlib
    is set to use a LaTeX that is missing, the disk is full) is named; it loses no result, and no other figure."""
    import matplotlib.pyplot as plt

    for suffix, draw in figures.items():
        try:
            figure, path = draw() if callable(draw) else draw, beside.with_name(f"{beside.stem}_{suffix}.png")
            write_whole(path, partial(figure.savefig, format="png", dpi=150))
            print(f"figure: {path}")
            if plt.get_backend().lower() == "agg":  # else a notebook shows it, or a desktop
                plt.close(figure)
        except Exception as error:
            print(f"note: no figure {suffix}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)


def read_record(path) -> dict:
    """A record that Run.write wrote. Raises UserError for another file, and for a record of an earlier version."""
    with data.in_a_line(f"{path} is no record"):
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        script, form = record["script"], record.get("form", 2)
    if form != FORM:
        raise UserError(f"{path}: an earlier {script} wrote it (form {form}, now {FORM}); run its command again")
    return record


def benchmark_options(said: dict) -> dict:
    """What settings, a script's or a record's, say of the data, as arguments of data.load_benchmark."""
    names = {"folder": "data", "corpus": "forget_corpus", "variant": "wmdp", "style": "prompt"}
    names |= {name: name for name in ("subjects", "seed", "pick_on", "pick_text", "limit", "skip_long", "topic")}
    return {name: said[flag] for name, flag in names.items() if said.get(flag) is not None}


def forget_title(*records: dict) -> str:
    """What the forget sets of these records are called, for the head of a table; a stand-in says so."""
    sets = [record["data"].get("wmdp_bio", {}) for record in records]
    return ", ".join(sorted({(of.get("topic") or "WMDP-Bio") + " stand-in" * of.get("stand_in", False) for of in sets}))


def refuse_unwritable(path: Path) -> None:
    """Make the folder of `path`. Raises UserError where no file of such a name can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, f"{path.name} is a folder there")
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}").close()
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; give another --out") from error


def write_whole(path: Path, write) -> None:
    """Call write(temporary path), then move the file or folder to `path`: a stopped run leaves nothing half-written. Of
    several processes the first one writes. Raises UserError where there is no room, or no right to."""
    if not data.is_first_process():
        return
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or first_line(error)}") from error
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def as_json(value):
    """Of a Measure, an array or tensor, or one of their numbers, what JSON can hold."""
    if type(value).__name__ == "Measure":
        return {"Measure": vars(value)}
    if not hasattr(value, "tolist"):
        raise TypeError(f"Run.cached cannot keep {value!r}")
    return {"array": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")} if value.shape else value.item()


def from_json(value: dict):
    """The other way."""
    import numpy as np

    from evaluation import Measure

    if set(value) == {"Measure"}:
        return Measure(**{k: tuple(v) if isinstance(v, list) else v for k, v in value["Measure"].items()})
    return np.array(value["array"], value["dtype"]) if set(value) == {"array", "dtype"} else value


def model_card(record: dict) -> str:
    """README.md of the trained model of a record."""
    from huggingface_hub import ModelCardData

    base, name, chosen = hub.preset(record["model"]).model, Path(record["model"]).name, record["chosen"]
    tags = ["unlearning", record["rows"][chosen]["method"]]
    head = ModelCardData(base_model=None if Path(base).is_dir() else base, library_name="transformers",
                         pipeline_tag="text-generation", tags=tags)  # fmt: skip
    command = re.sub(r"(?<!\S)(?:[A-Za-z]:|~)?[/\\]\S*[/\\]", "", record["command"])  # without this machine's folders

    def text(row, key):
        score, percent = record["rows"][row]["scores"][key], record["measures"][key]["unit"] == "%"
        values = [score[part] for part in ("mean", "low", "high") if part in score]
        mean, *ends = (f"{100 * value:.1f}" if percent else f"{value:.3f}" for value in values)
        return f"{mean} [{', '.join(ends)}]" if ends else mean

    first = next(iter(record["rows"]))
    scores = [f"- {about['title']} ({about['unit']}): {text(chosen, key)}, before {text(first, key)}\n"
              for key, about in record["measures"].items() if "/tuning/" not in key]  # fmt: skip
    return f"""---
{head.to_yaml()}
---

# {name}: {chosen}

{name} (`{record["identity"]["model"]}`, whose licence applies), trained to forget what {forget_title(record)}
questions ask by `{command}`. Made to study unlearning; it is no safeguard: what
unlearning takes away seldom survives fine-tuning on related texts, weights rounded to 4 bits, or another way of asking.
Scores with 95% intervals (of a stand-in for a data set nothing follows about hazardous knowledge):

{"".join(scores)}"""


def peak_gb() -> float | None:
    """Most memory that this process has had: of the GPUs where it has used some, else as a whole. None on Windows."""
    import torch

    most = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    if not most:
        with suppress(ImportError):
            from resource import RUSAGE_SELF, getrusage

            most = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes, kilobytes
    return round(most / 1e9, 2) if most else None
