"""
The shared command line: flags, the settings they come to, the grids that methods are tuned by, and how a run ends.

Nothing here takes long to import: a script reads its flags before it imports the rest, so --help answers at once.
"""

import argparse
import atexit
import itertools
import math
import os
import sys
import traceback
import warnings
from pathlib import Path

from data import LESS_MEMORY, WMDP, UserError, check_folder, first_line, ran_out
from hub import PRESETS, listed
from processes import LostProcess, leave, speak_as_one

# A notebook has bars of text here; what others import would ask for its widgets
warnings.filterwarnings("ignore", "IProgress not found")


def grid(**axes) -> list[dict]:
    """Every combination of the axes' values."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


MANY = (5, 10, 20, 50, 100, 200, 300, 400)
GRIDS = {
    "zero-ablation": grid(n_features=MANY),
    "mean-ablation": grid(n_features=MANY),
    "clamp": grid(n_features=(10, 20), clamp=(0.25, 0.5, 1, 2)),  # SAEBench: -25 to -200
    "random-features": grid(n_features=(10, 20), clamp=(0.25, 0.5, 1, 2)),
    "conditional-clamp": grid(n_features=(10, 20), clamp=(1, 2), threshold=(0.25, 0.5)),  # of the mean activation
    "refusal-clamp": grid(n_features=(10, 20), refusal=(0.2, 0.5, 1, 2)),
    "dsg": grid(n_features=(20, 50), clamp=(0.0625, 0.125, 0.25, 1)),  # its release: 20 to 200 features at -500
    "diff-in-means": grid(strength=(0.5, 1, 1.5, 2), behind=(False, True)),  # at --layer, or at all layers from it on
}
# What a single setting has where nothing else is said
USUAL = {"clamp": 1, "threshold": 0.25, "refusal": 1, "strength": 1, "behind": False}
BY_FEATURES = [name for name in GRIDS if name != "diff-in-means"]


PUSH = ("then upload what was trained, with a card, to that repository of the hub; a new one is public, unless the "
        "organization's default is another")  # fmt: skip


class ListPresets(argparse.Action):
    def __call__(self, parser, *_):
        print(listed())
        parser.exit()


def parser(doc: str, without: tuple[str, ...] = (), quiz: bool = False) -> argparse.ArgumentParser:
    """The flags that every script has, but for those `without`; a script adds its own, or one in place of ours. quiz:
    those that say how quizzes are asked, and which questions are, too."""
    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=shape, allow_abbrev=False, conflict_handler="resolve")

    def add(name, **options):
        if name not in without:
            p.add_argument(name, **options)

    add("--model", default="tiny", help=f"preset ({', '.join(PRESETS)}), hub id or folder (default: %(default)s)")
    add("--list", nargs=0, action=ListPresets, default=argparse.SUPPRESS,
        help="show the presets with the layers, widths and L0s of their SAEs")  # fmt: skip
    add("--sae", help="RELEASE:ID of SAELens's table, or a folder (default: the preset's SAE of --layer)")
    add("--layer", type=int, default=7, help="layer of the SAE; tiny has 3, 5, 7, 9, 15 (default: %(default)s)")
    add("--n-features", type=int, default=50, help="how many features to ablate (default: %(default)s)")
    add("--clamp", type=float, help="negative value that active features are set to (default: the preset's)")
    add("--pick", default="ratio", help="rule: ratio, of firing rates; retain-threshold (SAEBench); dsg (Dynamic SAE "
        "Guardrails); attribution, activation times gradient of the right answer, on the picking half; output-score, "
        "ratio among features that make the model say what they stand for (default: %(default)s)")  # fmt: skip
    add("--pick-on", default="half", choices=["half", "all"], help="half: pick on one half of the WMDP-Bio questions "
        "and score the other; all: pick and score on all, the old leaky number (default: %(default)s)")  # fmt: skip
    add("--pick-text", default="prompt", choices=["prompt", "prose"], help="prompt: pick on the questions as they are "
        "asked, and a feature must be rare in MMLU's development questions too; prose: on question and answer without "
        "the template, against Wikitext alone, which picks features of any quiz (default: %(default)s)")  # fmt: skip
    add("--data", help="folder with any of wmdp_bio, wmdp_bio_robust, wmdp_bio_cloze, mmlu, mmlu_dev, wikitext, "
        "openwebtext, forget_corpus .jsonl")  # fmt: skip
    add("--forget-corpus", metavar="FILE", help="your copy of the WMDP-Bio forget corpus, JSONL with a text in each "
        "line, or its hub id: picked and trained on in the questions' place")  # fmt: skip
    add("--context", type=int, default=128, help="tokens of a text that rates are counted on at a time; SAEBench and "
        "Farrell et al.: 1024 (default: %(default)s)")  # fmt: skip
    add("--edit-special", default="never", choices=["never", "all-but-bos"], help="special tokens, chat markers among "
        "them, are never edited, or as in SAEBench all are but the first token (default: %(default)s)")  # fmt: skip
    add("--skip-long", action="store_true", help="leave out, and count, questions longer than the model's positions")
    add("--limit", type=int, help="score only that many questions (a seeded sample) or documents of each data set")
    add("--batch-size", type=int, default=16, help="prompts per pass; changes memory, and results by rounding only "
        "(default: %(default)s)")  # fmt: skip
    add("--max-memory", type=float, metavar="GB", help="memory of the device that a run may have, weights among it; "
        "changes time, and results by rounding only (default: what is free)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of split, control features and bootstrap (default: %(default)s)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: cuda if there is one; accelerate launch decides "
        "for each process)")  # fmt: skip
    add("--device-map", choices=["auto", "balanced", "sequential"], help="spread a model that is larger than one GPU "
        "over all of them")  # fmt: skip
    add("--dtype", choices=["float32", "bfloat16"], help="of the model; SAEs stay in float32 (default: the preset's, "
        "which is bfloat16 for Gemma; elsewhere float32)")  # fmt: skip
    add("--no-sanity", action="store_true", help="go on even if the SAE does not fit the model")
    if quiz:
        add("--prompt", default="plain", choices=["plain", "chat", "saebench"], help="lm-eval's template; in a chat "
            "turn; or SAEBench's chat turn, answered after 'Answer: ('")  # fmt: skip
        add("--wmdp", default="all", choices=list(WMDP), help="what is asked in WMDP-Bio's place, and picked on: all "
            "of it; robust, EleutherAI's 868 that their options do not give away; cloze, its 1,076 that can be asked "
            "without options, answered in words (default: %(default)s)")  # fmt: skip
        add("--robust", action="store_true", help="score only questions right under all 24 orders of options")
        add("--subjects", help="MMLU subjects, comma-separated (default: SAEBench's four where they are, else all; "
            "lesson 1: all)")  # fmt: skip
    add("--out", help="record file; figures get the same name (default: results/<script>_<settings>.json)")
    return p


def latent_flags(p: argparse.ArgumentParser) -> None:
    """The flags of scripts that run refusal-clamp."""
    p.add_argument("--refusal-latent", type=int, help="for refusal-clamp: a latent active when the model declines")
    p.add_argument("--refusal-value", type=float, default=-500.0, help="what it is set to (default: %(default)s)")


def answered(p: argparse.ArgumentParser, name: str) -> None:
    """Answer --help and --list of a script that runs as `name`, before it imports what takes seconds."""
    if name == "__main__" and {"-h", "--help", "--list"} & set(sys.argv[1:]):
        p.parse_args()


def settings(p: argparse.ArgumentParser, flags: dict) -> argparse.Namespace:
    """The parser's defaults with `flags` over them, for `run(layer=3)` in a notebook; TypeError for unknown ones."""
    known = vars(p.parse_args([]))
    if unknown := set(flags) - set(known):
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    s = argparse.Namespace(**{**known, **flags})
    refuse_bad_numbers(s)
    # it would be taken for a flag that is not there
    if empty := [name for name, value in vars(s).items() if value in ("", []) and value != known[name]]:
        raise UserError(f"--{empty[0].replace('_', '-')}: nothing is given; leave it out, or say what")
    # from whatever folder a record is read, it must lead to them
    for name in ("model", "sae", "data", "forget_corpus"):
        if (place := getattr(s, name, None)) and place not in PRESETS and Path(place).exists():
            setattr(s, name, os.path.abspath(place))
    check_folder(getattr(s, "data", None))
    given = getattr(s, "features", None)  # a record has its latent
    if "refusal-clamp" in (getattr(s, "method", None) or ()) and s.refusal_latent is None and not given:
        raise UserError("refusal-clamp needs --refusal-latent, a latent that is active when the model declines")
    if "dtype" in known and s.dtype is None and "model" in known:
        s.dtype = PRESETS[s.model].dtype if s.model in PRESETS else "float32"
    if "clamp" not in known:
        return s
    if s.clamp is None:
        s.clamp = PRESETS[s.model].clamp if s.model in PRESETS else -100.0
    if not isinstance(s.clamp, list) and s.clamp >= 0:
        raise UserError(f"--clamp {s.clamp:g}: a negative number; zero ablation has a row of its own")
    return s


def refuse_bad_numbers(s: argparse.Namespace) -> None:
    """Raises UserError if a number of the settings, or one in a list of them, is NaN, infinite, or too small."""
    least = {"seed": 0, "n_features": 1, "controls": 1, "batch_size": 1, "limit": 1, "context": 1}
    for name, value in vars(s).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            flag = f"--{name.replace('_', '-')} {number}"
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{flag}: a finite number is wanted")
            if name in least and isinstance(number, int) and number < least[name]:
                raise UserError(f"{flag}: at least {least[name]}")


def parse(p: argparse.ArgumentParser) -> argparse.Namespace:
    """The settings that the command line gives; in a notebook, where sys.argv is not ours, the defaults. Raises
    UserError, and ends the run as `arguments` says."""
    return settings(p, arguments(p))


def arguments(p: argparse.ArgumentParser) -> dict:
    """The flags as the command line gives them. From here on a user's mistake ends in one line and exit code 2, Ctrl-C
    in 130, a lost process in 1; of several processes one is heard."""

    def mistake(message):
        raise UserError(f"{message} (see --help)")

    p.error, sys.excepthook = mistake, ended
    others = any(name in sys.argv[0] for name in ("kernel_launcher", "pydevconsole"))
    given = vars(p.parse_args([] if others else None))
    speak_as_one()
    sys.excepthook = ended  # torch.distributed, now that it is there, has its own in front, which loses the last word
    return given


def ended(kind, error, trace) -> None:
    """In place of sys.excepthook: a script's end that is not its last line."""
    say = speak_as_one()
    atexit.unregister(leave)
    if ran_out(error):
        error = UserError(f"no memory is left ({first_line(error)}): {LESS_MEMORY}")
    if isinstance(error, UserError | LostProcess):
        say(f"error: {error}")
        raise SystemExit(2 if isinstance(error, UserError) else 1)
    if isinstance(error, KeyboardInterrupt):
        print(f"\nstopped: {str(error) or 'nothing was written'}", file=sys.stderr)
        raise SystemExit(130)
    say("".join(traceback.format_exception(kind, error, trace)))


def command_line(run, p: argparse.ArgumentParser) -> None:
    """Call run with the flags that the command line gives."""
    run(**arguments(p))
