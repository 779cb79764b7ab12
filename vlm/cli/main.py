"""From a command line to a verb: parse, run, and say in one sentence what went wrong."""

import atexit
import contextlib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NoReturn

from vlm import DISTRIBUTION, __version__
from vlm.config import suggest
from vlm.errors import UsageError, VlmError

VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "the whole loop on drawn scenes, in minutes on two CPU cores"),
    "pack": ("pack", "folder, CSV, JSONL, Parquet or img2dataset output → shards"),
    "inspect": ("inspect", "counts, sizes, captions, corrupt and duplicate samples of shards, as a page"),
    "curate": ("curate", "filter, deduplicate, balance → a selection; nothing is re-packed"),
    "doctor": ("doctor", "disk → decode → augment → device → model, each alone: which one holds you back"),
    "tokenizer train": ("tokenizer", "a SentencePiece model from the captions of shards"),
    "train": ("train", "pretrain or fine-tune on shards"),
    "runs": ("runs", "list runs: how far each is, how good and how fast"),
    "runs compare": ("runs_compare", "runs side by side with their curves, or against the band of a recipe"),
    "soup": ("soup", "average models tuned from one start: uniform, weighted, greedy, interpolated"),
    "export": ("export", "a model for other tools, tried there first"),
    "eval": ("eval", "zero-shot, retrieval and caption truth of a model, as JSON and a page"),
    "classify": ("classify", "pictures into classes named on the spot"),
    "caption": ("caption", "a sentence for a picture, from a model with a decoder"),
    "embed": ("embed", "shards → embeddings, resumable"),
    "reinforce": ("reinforce", "shards → shards with what teachers make of views and captions, resumable"),
    "signals": ("signals", "embeddings → similarity, duplicates, clusters, nearness for vlm curate"),
    "index build": ("index_build", "embeddings → a FAISS index with its catalogue"),
    "index import": ("index_import", "embeddings of clip-retrieval, autofaiss, npy or Parquet → embeddings"),
    "index export": ("index_export", "the rows of an index → npy, Parquet, a FAISS file, clip-retrieval's folders"),
    "index add": ("index_add", "embeddings → rows of an index that is there"),
    "index update": ("index_update", "the same, in the place of rows with the same uid"),
    "index delete": ("index_delete", "rows away, by uid or by a filter"),
    "index compact": ("index_compact", "all segments of an index into one, without the dead rows"),
    "index fit-head": ("index_fit_head", "embeddings by two models → a head by which the new one asks old rows"),
    "index upgrade": ("index_upgrade", "an index carried over to a new model's head, nothing embedded again"),
    "index check": ("index_check", "checksums, joins, counts and distances of an index"),
    "index info": ("index_info", "what an index holds"),
    "search": ("search", "ask an index, by text, by picture, by a mix"),
}
"""Each verb with its module in `vlm.cli` and its line of help. Adding a verb is one file and one line here."""

LOG_LEVELS = {"--quiet": logging.WARNING, "--verbose": logging.DEBUG}
"""Flags before the verb that change what is logged."""

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def enter() -> NoReturn:
    """The command `vlm`: `main`, then an end that torch's threads cannot turn into an abort.

    A thread of torch (of gloo, of autograd) that gives up its last tensor while the interpreter is taken apart aborts
    the process: all was done and saved, and yet it fails (PyTorch issue 190489). So where torch was used and `main`
    came to its end, the process ends once all that waits for the exit has run, its interpreter whole.
    """
    codes: list[int] = []
    atexit.register(_end, codes)  # the first registered runs last
    codes.append(main())
    sys.exit(codes[0])


def _end(codes: list[int]) -> None:
    if codes and "torch" in sys.modules:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 misused."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.getLogger().setLevel(logging.ERROR)
    level = logging.INFO
    while words and words[0] in LOG_LEVELS:
        level = LOG_LEVELS[words.pop(0)]
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(overview())
            return 0 if words else 2
        if words[0] == "--version":
            print(f"{DISTRIBUTION} {__version__} (import name vlm)")
            return 0
        verb, rest = split_verb(words)
        with log_to_stderr(level):
            run_verb(verb, rest)
        return 0
    except VlmError as error:
        return print_error(str(error), error.exit_code)
    except KeyboardInterrupt:
        return print_error("interrupted; what was finished is kept, and the same command goes on from there.", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return print_error(_explain(error), 1)


class StderrHandler(logging.Handler):
    """Log records as plain lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; without tqdm imported there is no bar, and importing it would cost 30 ms."""
        try:
            line = self.format(record)
            if "tqdm" in sys.modules:
                from tqdm import tqdm

                tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def log_to_stderr(level: int = logging.INFO) -> Iterator[None]:
    """Show what the package logs on stderr while the block runs."""
    logger = logging.getLogger("vlm")
    before = logger.handlers, logger.level, logger.propagate
    # Replaced rather than added, so that a verb that runs another verb does not log every line twice.
    logger.handlers = [StderrHandler()]
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers, logger.level, logger.propagate = before


def overview() -> str:
    """The help of `vlm` itself."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items()]
    return "\n".join(
        [
            "usage: vlm [--quiet | --verbose] VERB …        (vlm VERB --help: its options; vlm --version)",
            "",
            "pairs ─pack▶ shards ─train▶ run ─embed▶ embeddings ─index build▶ index ─search▶ answers",
            "",
            *lines,
            "",
            "Results go to stdout, logs to stderr; use --json for machine-readable output.",
            "Exit codes: 0 success, 1 failure, 2 usage error.",
        ]
    )


def split_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb (one word or two) and what follows it.

    Raises:
        UsageError: there is no such verb; the nearest is named.
    """
    for length in (2, 1):
        verb = " ".join(words[:length])
        if len(words) >= length and verb in VERBS:
            return verb, list(words[length:])
    family = [verb for verb in VERBS if verb.startswith(f"{words[0]} ")]
    asked = " ".join(words[:2]) if family else words[0]
    raise UsageError(f"There is no verb {asked!r}; {suggest(asked, family or list(VERBS))} (vlm --help lists all)")


def run_verb(verb: str, words: list[str]) -> None:
    """Parse the words into the verb's `Arguments` and run it."""
    import tyro

    module = importlib.import_module(f"vlm.cli.{VERBS[verb][0]}")
    arguments = tyro.cli(
        module.Arguments,
        args=words,
        default=_defaults(module, words),
        prog=f"vlm {verb}",
        description=module.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    module.run(arguments)


def print_error(message: str, exit_code: int) -> int:
    """One line on stderr; returns the exit code."""
    print(f"vlm: {message}", file=sys.stderr, flush=True)
    return exit_code


def _defaults(module: ModuleType, words: list[str]) -> object | None:
    """The defaults a verb derives from its first word (a preset), if it does."""
    return module.defaults(words) if hasattr(module, "defaults") else None


def _explain(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in DISK_FULL:
        return f"the disk is full{where}: free some space and repeat the command; nothing half-written was left."
    return f"{error.strerror or error}{where}"
