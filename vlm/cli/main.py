"""From a command line to a verb: parse, run, log, and report an error in one sentence."""

import atexit
import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from vlm import DISTRIBUTION, __version__
from vlm.config import suggest
from vlm.console import log_to_stderr
from vlm.errors import UsageError, VlmError, explain_os_error

if TYPE_CHECKING:
    from vlm.cli.options import Verb

VERBS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("quickstart", "Quickstart", "the whole pipeline on synthetic shapes, in minutes on two CPU cores"),
    "pack": ("pack", "Pack", "folder, CSV, JSONL, Parquet or img2dataset output → shards"),
    "inspect": ("inspect", "Inspect", "counts, sizes, captions, corrupt and duplicate samples of shards, as a page"),
    "concepts": (
        "curate",
        "BuildConcepts",
        "captions or text, titles, WordNet → concepts that vlm curate balances over",
    ),
    "curate": ("curate", "Curate", "filter, deduplicate, balance → a selection; nothing is repacked"),
    "doctor": ("doctor", "Doctor", "benchmark the input pipeline: disk, decode, augment, device, model"),
    "tokenizer train": ("train", "TrainTokenizer", "captions of shards → a SentencePiece tokenizer"),
    "train": ("train", "Train", "pretrain or fine-tune on shards"),
    "scale": (
        "scale",
        "Scale",
        "runs on less data, and smaller models → a law, and a checked forecast of what more would bring",
    ),
    "mixture": ("mixture", "Mixture", "small runs on drawn mixtures → the weights of their sources, checked"),
    "runs": ("runs", "ListRuns", "list training runs with progress, quality and throughput"),
    "runs compare": ("runs", "CompareRuns", "compare runs with each other, or with a recipe's reference curves"),
    "models": ("models", "ListModels", "list the models that load without a network, and fetch one ahead"),
    "soup": ("soup", "MakeSoup", "average fine-tuned models: uniform, weighted, greedy, interpolated"),
    "export": ("models", "Export", "a model → another tool's format, verified there"),
    "eval": ("eval", "Eval", "zero-shot, retrieval and caption accuracy of a model, as JSON and a page"),
    "classify": ("predict", "Classify", "zero-shot classification of images"),
    "caption": ("predict", "Caption", "captions for images, by a model with a caption decoder"),
    "explain": ("predict", "Explain", "why an image matches a text: heat maps over the image, word by word"),
    "embed": ("embed", "Embed", "shards → embeddings, resumable"),
    "reinforce": ("reinforce", "Reinforce", "shards → shards with precomputed teacher embeddings, resumable"),
    "score": ("curate", "Score", "embeddings → CLIP score, duplicates, clusters, target similarity for vlm curate"),
    "relate": (
        "train",
        "Relate",
        "shards → equal captions, near-duplicate images, neighbours: for vlm train --batches",
    ),
    "index build": ("index", "BuildIndex", "embeddings → a FAISS index with a metadata catalog"),
    "index import": (
        "index",
        "ImportEmbeddings",
        "embeddings of clip-retrieval, autofaiss, npy or Parquet → embeddings",
    ),
    "index export": ("index", "ExportIndex", "rows of an index → npy, Parquet, a FAISS file, clip-retrieval's folders"),
    "index add": ("index_changes", "AddRows", "add a folder of images, shards or embeddings: what is new of it"),
    "index update": ("index_changes", "UpdateRows", "upsert images, shards or embeddings by uid"),
    "index set": ("index_changes", "SetMetadata", "set metadata columns from a table, without embedding again"),
    "index delete": ("index_changes", "DeleteRows", "delete rows by uid or filter"),
    "index rollback": ("index_changes", "RollBack", "undo the last change of an index"),
    "index compact": ("index_changes", "CompactIndex", "merge all segments into one and drop deleted rows"),
    "index map": ("index_changes", "MakeMap", "lay the rows out on a map in two dimensions, for the page of vlm serve"),
    "index relocate": ("index_changes", "Relocate", "say where the images of an index lie now"),
    "index fit-head": (
        "index",
        "FitHead",
        "embeddings by two models → a projection from the new model to the old rows",
    ),
    "index fit-reranker": (
        "index",
        "FitReranker",
        "image embeddings with captions → a poly-encoder for vlm search --rerank",
    ),
    "index upgrade": ("index", "UpgradeIndex", "migrate an index to a new model without re-embedding"),
    "index check": ("index", "CheckIndex", "verify checksums, referential integrity, counts and distances"),
    "index info": ("index", "IndexInfo", "show what an index holds"),
    "search": ("search", "Search", "search an index by text, image, or both"),
    "find": ("search", "Find", "search a folder of images where it lies; the first call indexes it"),
    "watch": ("search", "Watch", "keep the index of a folder of images up to date"),
    "serve": ("serve", "Serve", "serve indexes over HTTP: a search page and an API"),
}
"""Each verb with its module in `vlm.cli`, its class there and its line of help. A new verb is a class and a line."""

VERB_ALIASES = {"signals": "score"}
"""Verbs by their names before 1.0, with the ones of today."""

RENAMED_FLAGS: dict[str, dict[str, str]] = {
    "curate": {"--rule": "--filter"},
    "embed": {"--codes": "--quantize"},
    "train": {
        "--table-rate": "--embedding-lr-mult",
        "--gain-rate": "--norm-lr-mult",
        "--kernel-rate": "--conv-lr-mult",
        "--temperature-rate": "--logit-scale-lr-mult",
        "--clip-norm": "--grad-clip-norm",
        "--average-decay": "--ema-decay",
        "--rewind-limit": "--rollback-limit",
        "--hang-minutes": "--watchdog-minutes",
    },
    "index build": {
        "--kind": "--index-type",
        "--links": "--hnsw-m",
        "--rerank": "--refine-factor",
        "--plan-rows": "--tune-rows",
    },
    "index compact": {"--kind": "--index-type"},
    "index fit-head": {"--pictures": "--max-images"},
}
"""Flags by their names before 1.0, with the ones of today, by verb. Old command lines work until 1.0."""

LOG_LEVELS = {"--quiet": logging.WARNING, "--verbose": logging.DEBUG}
"""Flags before the verb that change what is logged."""


def enter() -> NoReturn:
    """The command `vlm`: `main`, then an exit that torch's threads cannot turn into an abort.

    A thread of torch (of gloo, of autograd) that frees its last tensor during interpreter shutdown aborts the process,
    although all work is done and saved (PyTorch issue 190489). So if torch was used and `main` returned, the process
    exits right after the exit functions, before the interpreter is torn down.
    """
    codes: list[int] = []
    atexit.register(_end, codes)  # the first registered runs last
    codes.append(main())
    if codes[0] and (multiprocessing := sys.modules.get("multiprocessing")):
        # a worker that is stopped or hangs does not hear SIGTERM, and Python's own exit would wait for it for ever
        for worker in multiprocessing.active_children():
            worker.kill()
    sys.exit(codes[0])


def _end(codes: list[int]) -> None:
    if codes and "torch" in sys.modules:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 success, 1 failure, 2 usage error."""
    words = list(sys.argv[1:] if argv is None else argv)
    _replace_unprintable()
    # other packages warn of what is none of the user's business; ours logs to its own handler
    logging.getLogger().setLevel(logging.ERROR)
    level = logging.INFO
    # only before the verb: after it they are options of the verb, which has none of these names
    while words and words[0] in LOG_LEVELS:
        level = LOG_LEVELS[words.pop(0)]
    # `vlm help train` as people try it
    if len(words) > 1 and words[0] == "help":
        words = [*words[1:], "--help"]
    try:
        if not words or words[0] in _HELP:
            print(overview())
            return 0 if words else 2
        if words[0] == "--version":
            print(f"{DISTRIBUTION} {__version__} (import name vlm)")
            return 0
        if family_help := family_overview(words):
            print(family_help)
            # a family whose first word is a verb too goes on with that verb's own help
            if words[0] not in VERBS:
                return 0 if len(words) > 1 else 2
        verb, rest = split_verb(words)
        with log_to_stderr(level):
            run_verb(verb, rest)
        return 0
    except VlmError as error:
        return print_error(str(error), error.exit_code)
    except KeyboardInterrupt:
        return print_error("interrupted; finished work is kept. Rerun the same command to resume.", 1)
    except BrokenPipeError:
        # the reader has closed (vlm … | head): what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return print_error(explain_os_error(error), 1)


def _replace_unprintable() -> None:
    """Replace characters that the terminal cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def overview() -> str:
    """The help of `vlm` itself."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {line}" for verb, (_, _, line) in VERBS.items()]
    return "\n".join(
        [
            "usage: vlm [--quiet | --verbose] VERB …        (vlm VERB --help: its options; vlm --version)",
            "",
            "pairs ─pack▶ shards ─train▶ run ─embed▶ embeddings ─index build▶ index ─search▶ results",
            "",
            *lines,
            "",
            "Results go to stdout, logs to stderr; use --json for machine-readable output.",
            "Exit codes: 0 success, 1 failure, 2 usage error.",
        ]
    )


_HELP = ("-h", "--help", "help")


def family_overview(words: Sequence[str]) -> str:
    """The verbs that begin with this word, if nothing but help is asked for; else empty."""
    family = {verb: line for verb, (_, _, line) in VERBS.items() if verb.startswith(f"{words[0]} ")}
    asks_help = words[1] in _HELP if len(words) > 1 else words[0] not in VERBS
    if not family or not asks_help:
        return ""
    if words[0] in VERBS:
        family = {words[0]: VERBS[words[0]][2], **family}
    width = max(map(len, family))
    lines = [f"  {verb:<{width}}  {line}" for verb, line in family.items()]
    return "\n".join([f"usage: vlm {words[0]} VERB …        (vlm {words[0]} VERB --help: its options)", "", *lines])


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb (one word or two) and what follows it.

    Raises:
        UsageError: there is no such verb; the nearest is named.
    """
    # two words first, since `runs` is a verb as well as the family of `runs compare`
    for length in (2, 1):
        verb = " ".join(words[:length])
        verb = VERB_ALIASES.get(verb, verb)
        if len(words) >= length and verb in VERBS:
            return verb, list(words[length:])
    family = [verb for verb in VERBS if verb.startswith(f"{words[0]} ")]
    name = " ".join(words[:2]) if family else words[0]
    raise UsageError(f"There is no verb {name!r}; {suggest(name, family or list(VERBS))} (vlm --help lists all)")


def run_verb(verb: str, words: list[str]) -> None:
    """Parse the words into the verb's options and run it."""
    parse_verb(verb, words).run()


def parse_verb(verb: str, words: list[str]) -> "Verb":
    """The verb with its options set; a verb may derive their defaults from the words (a preset)."""
    import tyro

    module_name, class_name, _ = VERBS[verb]
    verb_class = getattr(importlib.import_module(f"vlm.cli.{module_name}"), class_name)
    words = current_flags(verb, words)
    return tyro.cli(
        verb_class,
        args=words,
        default=verb_class.defaults(words) if hasattr(verb_class, "defaults") else None,
        prog=f"vlm {verb}",
        # one flag for a switch, in place of --json and --no-json
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def current_flags(verb: str, words: list[str]) -> list[str]:
    """The words with old flags replaced; `-` and `_` in a flag are alike.

    >>> current_flags("index compact", ["INDEX", "--kind=flat"])
    ['INDEX', '--index-type=flat']
    """
    renamed = RENAMED_FLAGS.get(verb, {})
    current: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        new_flag = renamed.get(flag.replace("_", "-"), flag)
        current.append(f"{new_flag}{equals}{value}")
    return current


def print_error(message: str, exit_code: int) -> int:
    """One line on stderr; returns the exit code."""
    print(f"vlm: {message}", file=sys.stderr, flush=True)
    return exit_code
