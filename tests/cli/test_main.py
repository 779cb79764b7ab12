import errno
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
from tqdm import tqdm

import vlm.cli.main as main_module
from tests import preloaded
from tests.data.tar_fixture import tiny_image
from tests.docs_script import is_up_to_date
from vlm import __version__
from vlm.cli.main import RENAMED_FLAGS, VERBS, current_flags, log_to_stderr, main
from vlm.console import progress


def run(capsys, *words):
    """(exit code, stdout, stderr) of a command."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def loop(scene_shards, scene_tokenizer, tmp_path_factory):
    """A tiny run with its embeddings and index, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("loop")
    train, val = scene_shards / "train", scene_shards / "val"
    flags = ["--steps", "3", "--batch-size", "16", "--workers", "0", "--tokenizer", scene_tokenizer]
    commands = [
        ["train", "tiny", "--data", train, "--run", folder / "run", *flags],
        ["train", "tiny", "--data", train, "--run", folder / "other", *flags, "--seed", "1"],
        ["embed", folder / "run", val, folder / "embeddings", "--workers", "0"],
        ["index", "build", folder / "embeddings", folder / "index"],
    ]
    for words in commands:
        assert main([str(word) for word in words]) == 0
    return folder


def test_the_help_lists_every_verb(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(capsys, verb):
    code, out, _ = run(capsys, *verb.split(), "--help")
    assert code == 0
    assert f"usage: vlm {verb}" in out


@pytest.mark.parametrize("family", sorted({verb.split()[0] for verb in VERBS if " " in verb} - set(VERBS)))
def test_a_family_of_verbs_lists_them(capsys, family):
    code, out, _ = run(capsys, family, "--help")
    assert code == 0
    verbs = [verb for verb in VERBS if verb.startswith(f"{family} ")]
    assert [line for line in out.splitlines() if line.startswith("  ")] == [
        line for line in out.splitlines() if line.strip().startswith(tuple(verbs))
    ]
    assert all(f"  {verb} " in out for verb in verbs)
    # without a verb it is misuse, answered alike
    assert run(capsys, family)[:2] == (2, out)
    assert run(capsys, "help", family)[:2] == (0, out)


def test_a_verb_that_is_a_family_too_lists_it_before_its_own_help(capsys):
    code, out, _ = run(capsys, "runs", "--help")
    assert code == 0
    assert out.index("  runs compare ") < out.index("usage: vlm runs [-h]")
    assert run(capsys, "help", "runs", "compare")[1].startswith("usage: vlm runs compare")


def test_a_verb_of_before_still_works(capsys):
    code, out, _ = run(capsys, "signals", "--help")
    assert code == 0
    assert "usage: vlm score" in out


@pytest.mark.parametrize(
    ("verb", "old_flag", "new_flag"),
    [(verb, *flags) for verb, renamed in RENAMED_FLAGS.items() for flags in renamed.items()],
)
def test_flags_of_before_still_work(capsys, verb, old_flag, new_flag):
    assert current_flags(verb, [old_flag, f"{old_flag}=3", old_flag.replace("-", "_").replace("__", "--", 1)]) == [
        new_flag,
        f"{new_flag}=3",
        new_flag,
    ]
    _, out, _ = run(capsys, *verb.split(), "--help")
    assert new_flag in out


def test_the_reference_page_is_what_the_commands_print():
    assert is_up_to_date("cli.md"), "python scripts/write_docs.py"


def test_search_answers_with_key_score_and_caption(capsys, loop):
    code, out, _ = run(capsys, "search", loop / "index", "a red circle", "--top", "3", "--json")
    hits = json.loads(out)["hits"]
    assert code == 0
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert hits[0]["score"] >= hits[1]["score"]
    assert hits[0]["key"].startswith("val-")
    assert hits[0]["captions"]["en"]


def test_search_by_image_finds_the_image_itself(capsys, loop, scene_shards, tmp_path):
    from vlm.data.tar import ShardReader

    sample = ShardReader(str(scene_shards / "val" / "shard-00000.tar")).read(7)
    (tmp_path / "x.jpg").write_bytes(sample.image)
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "search", loop / "index", "--image", tmp_path / "x.jpg", "--html", page, "--json")
    assert code == 0
    assert json.loads(out)["hits"][0]["key"] == sample.key
    assert "data:image" in page.read_text()


def test_classify_gives_probabilities_that_add_up(capsys, loop, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "x.png")
    code, out, _ = run(
        capsys, "classify", loop / "run", tmp_path / "x.png", "--classes", "red circle,blue star", "--json"
    )
    assert code == 0
    assert sum(entry["probability"] for entry in json.loads(out)[0]["classes"]) == pytest.approx(1)


def test_eval_writes_json_and_a_page(capsys, loop, scene_shards, tmp_path):
    words = [
        "--retrieval",
        scene_shards / "val",
        "--classes",
        scene_shards / "val",
        "--languages",
        "en",
        "--workers",
        "0",
    ]
    code, out, _ = run(capsys, "eval", loop / "run", *words, "--out", tmp_path / "report", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["retrieval"]["num_images"] == 40
    assert values == json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert "zero-shot" in (tmp_path / "report" / "report.html").read_text()
    assert len(list((tmp_path / "report" / "samples").glob("*.parquet"))) == 2


def test_an_index_of_another_model_is_refused(capsys, loop):
    code, _, err = run(capsys, "search", loop / "index", "a red circle", "--model", loop / "other")
    assert code == 2
    assert "fingerprint" in err or "another model" in err


def test_caption_with_a_model_that_cannot_is_refused(capsys, loop, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    code, _, err = run(capsys, "caption", loop / "run", tmp_path / "x.png")
    assert code == 2
    assert "no caption decoder" in err


def table(folder, text):
    (folder / "captions.csv").write_text(text)
    return folder


def test_missing_columns_are_named_with_those_found(capsys, tmp_path):
    code, _, err = run(capsys, "pack", table(tmp_path, "picture_name,words\na.jpg,hello\n"), tmp_path / "out")
    assert code == 2
    assert "picture_name" in err
    assert "--caption-column" in err or "--image-column" in err
    assert not (tmp_path / "out").exists()


def test_too_many_unreadable_images_end_the_pack_with_their_names(capsys, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    code, _, err = run(capsys, "pack", table(tmp_path, "file,caption\na.jpg,hello\n"), tmp_path / "out")
    assert code == 1
    assert "a.jpg" in err or "unreadable" in err
    assert "--max-bad" in err
    assert not list((tmp_path / "out").glob("*.tar"))


def test_an_empty_folder_is_refused(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, "pack", tmp_path / "empty", tmp_path / "out")
    assert code == 2
    assert "empty" in err


def test_an_unknown_verb_preset_and_key_name_the_nearest(capsys, tmp_path):
    assert "did you mean 'train'" in run(capsys, "trian")[2]
    assert "did you mean 'tiny'" in run(capsys, "train", "tinny")[2]
    (tmp_path / "x.toml").write_text("batch_sise = 3\n")
    code, _, err = run(capsys, "train", tmp_path / "x.toml")
    assert code == 2
    assert "did you mean 'batch_size'" in err


def test_a_misspelt_flag_is_misuse_and_hints_at_the_right_one(capsys):
    code, out, err = run(capsys, "train", "tiny", "--learning-rat", "1")
    assert code == 2
    assert "--learning-rate" in out + err


def test_a_tar_cut_short_is_refused_by_name(capsys, scene_shards, scene_tokenizer, tmp_path):
    shutil.copytree(scene_shards / "train", tmp_path / "shards")
    shard = tmp_path / "shards" / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-30_000])
    words = ["train", "tiny", "--data", tmp_path / "shards", "--run", tmp_path / "run", "--tokenizer", scene_tokenizer]
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "shard-00001.tar" in err
    assert "--allow-damage" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [("pack", "scenes"), ("index", "build", "embeddings"), ("embed", "run", "val")])
def test_an_out_that_exists_is_left_alone(capsys, words, loop, scene_shards, tmp_path):
    places = {"embeddings": loop / "embeddings", "run": loop / "run", "val": scene_shards / "val"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    code, _, err = run(capsys, *[places.get(word, word) for word in words], tmp_path / "out")
    assert code == 2
    assert "exists" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_full_disk_is_said_and_leaves_nothing_half_written(capsys, monkeypatch, tmp_path):
    import vlm.files

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vlm.files.os, "fsync", full)
    code, _, err = run(capsys, "pack", "scenes", tmp_path / "out", "--scenes.number", "5")
    assert code == 1
    assert "disk is full" in err
    assert not list(tmp_path.rglob("*.tar"))
    assert not list(tmp_path.rglob("*.part"))


def test_nothing_to_measure_and_nothing_to_ask_are_misuse(capsys, loop):
    assert run(capsys, "eval", loop / "run")[0] == 2
    assert run(capsys, "search", loop / "index")[0] == 2


def test_a_missing_shard_is_named(capsys, loop):
    code, _, err = run(capsys, "eval", loop / "run", "--retrieval", "nowhere/{00..01}.tar")
    assert code == 2
    assert "nowhere/00.tar" in err


def test_the_version_names_the_distribution(capsys):
    assert run(capsys, "--version")[1] == f"vlm-pipeline {__version__} (import name vlm)\n"
    assert sys.version_info >= (3, 11)


def test_what_the_package_logs_goes_to_stderr_by_level(capsys, monkeypatch):
    logger = logging.getLogger("vlm.data.pack")

    def run_verb(verb, words):
        logger.debug("a detail")
        logger.info("a step")
        logger.warning("a warning")

    monkeypatch.setattr(main_module, "run_verb", run_verb)
    assert run(capsys, "pack") == (0, "", "a step\na warning\n")
    assert run(capsys, "--quiet", "pack") == (0, "", "a warning\n")
    assert run(capsys, "--verbose", "pack") == (0, "", "a detail\na step\na warning\n")


def test_a_log_line_does_not_tear_a_progress_bar(capsys):
    with log_to_stderr(), tqdm(total=2, desc="embed", file=sys.stderr, mininterval=0, ascii=True) as shown:
        shown.update()
        logging.getLogger("vlm.index").info("part 3 is complete")
        shown.update()
    drawn = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert "part 3 is complete" in [line.strip() for line in drawn]


def test_quiet_draws_no_progress_bar(capsys):
    with log_to_stderr(logging.WARNING), progress(total=2, what="embed") as shown:
        shown.update()
    assert capsys.readouterr().err == ""


ENTERED = """
import atexit, os, sys, torch
import vlm.cli.main
class Kept:
    write = staticmethod(os.write)
    def __del__(self):
        self.write(1, b"the interpreter was taken apart")
def work():
    sys.kept = Kept()
    atexit.register(print, "exit functions ran")
    print("words")
    if sys.argv[1] == "fails":
        raise ValueError("by a mistake")
    return int(sys.argv[1])
vlm.cli.main.main = work
vlm.cli.main.enter()
"""


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_command_that_used_torch_ends_before_the_interpreter_is_taken_apart(code):
    done = preloaded.run([sys.executable, "-c", ENTERED, str(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "words\nexit functions ran\n")


def test_a_mistake_in_a_command_ends_as_mistakes_do():
    done = preloaded.run([sys.executable, "-c", ENTERED, "fails"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ValueError: by a mistake" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_unicode_shows_stand_ins_and_json_escapes(tmp_path, encoding):
    (tmp_path / "set" / "猫").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "set" / "猫" / f"{number}.jpg").write_bytes(tiny_image(number))
    environment = os.environ | {"PYTHONIOENCODING": encoding}

    def run(*words):
        command = [sys.executable, "-m", "vlm", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout

    run("pack", "set", "out")
    assert b"Traceback" not in run("inspect", "out")
    assert "猫" in json.dumps(json.loads(run("inspect", "out", "--json")), ensure_ascii=False)
