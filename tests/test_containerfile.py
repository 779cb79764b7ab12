"""The Containerfile, as far as it can be checked without a container engine: what it names is there.

Its pip command was run in a fresh environment of its Python on a clone, and its entry point without rights to write.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from vlm.cli.main import VERBS
from vlm.cli.serve import Serve

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Each instruction and its words, in their order; lines that end with a backslash are joined."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, words) for name, words in found]


def words_of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [words for instruction, words in instructions if instruction == name]


def test_it_begins_with_a_python_that_the_project_runs_on(instructions: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, image = instructions[0]
    least = tuple(map(int, re.findall(r"\d+", project["requires-python"])))
    assert name == "FROM"
    assert tuple(map(int, re.findall(r"\d+", image))) >= least


def test_what_pip_is_told_is_in_the_clone(instructions: list[tuple[str, str]]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    [install] = [words for words in words_of(instructions, "RUN") if "pip install" in words]
    words = shlex.split(install.split("&&")[0])
    assert (ROOT / words[words.index("-c") + 1]).is_file()
    [target] = [word for word in words if word.startswith(".[")]
    assert set(target.removeprefix(".[").removesuffix("]").split(",")) <= set(extras)
    # copied before it is installed, all but what the image has no use for
    names = [name for name, _ in instructions]
    assert names.index("COPY") < names.index("RUN", names.index("COPY"))
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for needed in (
        "vlm",
        "data",
        "train",
        "index",
        "pyproject.toml",
        "setup.py",
        "constraints.txt",
        "README.md",
        "LICENSE",
    ):
        assert (ROOT / needed).exists()
        assert needed not in ignored


def test_it_starts_the_service_as_nobody_special_on_the_port_that_is_exposed_and_asked(
    instructions: list[tuple[str, str]],
) -> None:
    entry = json.loads(words_of(instructions, "ENTRYPOINT")[0])
    assert entry[0] == "vlm"
    assert entry[1] in VERBS
    assert entry[2:] == ["--host", "0.0.0.0"]
    assert words_of(instructions, "EXPOSE") == [str(Serve.port)]
    assert words_of(instructions, "USER") == ["vlm"]
    [check] = words_of(instructions, "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert f"http://127.0.0.1:{Serve.port}/ready" in command[-1]
    compile(command[-1], "healthcheck", "exec")
