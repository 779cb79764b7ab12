"""The tutorials, run one after the other in one folder, with fewer images and steps."""

import re
import shlex
from pathlib import Path

import pytest

from vlm.cli.main import main
from vlm.data.sources.source import SceneOptions, SourceOptions
from vlm.data.sources.source_registry import open_source

TUTORIALS = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
COMMANDS = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
# what is relevant is calibrated from 20 images on
NUM_PHOTOS = 24
# in place of what a command says: enough to run every step
SHORTER = {"--scenes.number": "48", "--steps": "2"}
# the peak of the machine is not measured
TRAINING = ["--batch-size", "16", "--warmup-steps", "1", "--workers", "0", "--peak-tflops", "1"]


def commands_of(page: str) -> list[list[str]]:
    """The words of each command that a tutorial has run, shortened."""
    commands: list[list[str]] = []
    for block in COMMANDS.findall((TUTORIALS / page).read_text(encoding="utf-8")):
        for line in block.splitlines():
            words = shlex.split(line)
            assert words[0] == "vlm", line
            for flag, value in SHORTER.items():
                if flag in words:
                    words[words.index(flag) + 1] = value
            commands.append(words[1:] + (TRAINING if words[1] == "train" else []))
    return commands


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with `photos/`, the model of `vlm find` named as the tutorial does."""
    source = open_source("scenes", SourceOptions(scenes=SceneOptions(number=NUM_PHOTOS, is_distinct=True)))
    (tmp_path / "photos").mkdir()
    for number in range(NUM_PHOTOS):
        (tmp_path / "photos" / f"{number:03}.png").write_bytes(source.read(number).image)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_MODEL", "runs/first")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


def test_every_command_of_the_tutorials_succeeds_in_their_order(working_folder, capsys):
    commands = [*commands_of("first-search.md"), *commands_of("photos.md"), *commands_of("fine-tune.md")]
    assert len(commands) > 20
    for words in commands:
        assert main(words) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
    # what the pages tell the reader to open
    for page in ("shards.html", "report/report.html", "results.html", "curation.html", "report-soup/report.html"):
        assert (working_folder / page).stat().st_size > 1000, page
    # nothing is written into the folder of photos
    assert len(list((working_folder / "photos").iterdir())) == NUM_PHOTOS
