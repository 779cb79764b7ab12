"""The documentation names only what exists: links, repository paths, benchmarks, verbs and flags."""

import re
from pathlib import Path

import pytest

from tests.docs_script import is_up_to_date, load_write_docs
from vlm.cli.main import VERB_ALIASES, VERBS, run_verb, split_verb
from vlm.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    # the log tells of earlier states of the tree
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "log.md"),
]
FOLDERS = ("benchmarks", "data", "docs", "index", "scripts", "tests", "train", "vlm")
README_MAX_LINES = 150

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
FENCED_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# of a kind that the repository has: `train/metadata.csv` is a file of a user's data set
REPOSITORY_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/(?:[\w./-]*(?:\.py|\.md|\.toml|/)|[\w/-]*)")
VLM_COMMAND = re.compile(r"^(?:accelerate launch .*?-m |torchrun .*?-m -- |for .*?; do |python -m )?(vlm .*)$")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z.-]*")
# a table whose head names a verb: what stands below that cell are its flags
TABLE = re.compile(r"^\|.*`vlm [a-z ]+`.*\|\n\|[-|]+\|\n(?:\|.*\|\n)+", re.MULTILINE)
HEAD = re.compile(r"`(vlm [a-z ]+)`")
# messages that a page quotes, with … for what is filled in
QUOTED_MESSAGE = re.compile(r"^> (.+)$", re.MULTILINE)
# words that stand for a verb
PLACEHOLDERS = {"VERB", "…"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_spans(text: str) -> list[str]:
    """The back-ticked spans of a page outside its fenced blocks."""
    return CODE_SPAN.findall(FENCED_BLOCK.sub("", text))


def vlm_commands(text: str) -> list[str]:
    """The command lines of vlm in the fenced blocks of a page and in its code spans, without comments and pipes."""
    blocks = [block.replace("\\\n", " ") for block in FENCED_BLOCK.findall(text)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    commands: list[str] = []
    for line in [*lines, *code_spans(text)]:
        match = VLM_COMMAND.match(line.split("  #")[0])
        if match:
            commands += [part.strip() for part in re.split(r"&&|;", match[1]) if part.strip().startswith("vlm ")]
    return commands


def names_a_verb(command: str) -> bool:
    """Whether the words after `vlm` begin with a verb, its alias, a family of verbs, or a flag of vlm itself."""
    words = command.split()[1:]
    if words[0].startswith("--") or words[0] in PLACEHOLDERS:
        return True
    families = {verb.split()[0] for verb in (*VERBS, *VERB_ALIASES)}
    if words[0] not in families:
        return False
    try:
        split_verb(words)
    except UsageError:
        return len(words) == 1
    return True


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The printed help of a verb."""
    with pytest.raises(SystemExit):
        run_verb(verb, ["--help"])
    return capsys.readouterr().out


def verb_columns(text: str) -> list[str]:
    """A command for each cell with flags in the columns of tables that are headed by a verb."""
    commands: list[str] = []
    for table in TABLE.findall(text):
        head, _, *rows = [row.strip("|").split("|") for row in table.strip().splitlines()]
        for column, cell in enumerate(head):
            verb = HEAD.search(cell)
            flags = [" ".join(FLAG.findall(row[column])) for row in rows] if verb else []
            commands += [f"{verb[1]} {words}" for words in flags if verb and words]
    return commands


@pages
def test_relative_links_lead_to_files_and_headings(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


@pages
def test_repository_paths_exist(page):
    for span in code_spans(page.read_text(encoding="utf-8")):
        path = span.split("::")[0]
        if REPOSITORY_PATH.fullmatch(path):
            assert (ROOT / path).exists(), span


@pages
def test_benchmarks_and_test_programs_that_commands_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"benchmarks/run ([a-z_]+)", text):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name
    for module in re.findall(r"python -m (tests[.\w]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


@pages
def test_commands_name_verbs(page):
    for command in vlm_commands(page.read_text(encoding="utf-8")):
        assert names_a_verb(command), command


def test_flags_of_commands_are_in_the_help(capsys):
    commands_by_verb: dict[str, list[str]] = {}
    for page in PAGES:
        if page.name == "cli.md":
            continue
        text = page.read_text(encoding="utf-8")
        for command in [*vlm_commands(text), *verb_columns(text)]:
            words = command.split()[1:]
            if FLAG.search(command) and not words[0].startswith("-"):
                commands_by_verb.setdefault(split_verb(words)[0], []).append(command)
    assert {"pack", "curate", "train", "eval", "search"} <= commands_by_verb.keys()

    for verb, commands in commands_by_verb.items():
        known_flags = set(FLAG.findall(help_of(verb, capsys)))
        for command in commands:
            assert set(FLAG.findall(command)) <= known_flags, command


def test_tables_for_users_of_other_tools_name_flags():
    for page in sorted((ROOT / "docs" / "coming-from").glob("*.md")):
        assert len(verb_columns(page.read_text(encoding="utf-8"))) >= 5, page.name


def test_messages_that_troubleshooting_quotes_are_in_the_code():
    sources = [path for folder in ("vlm", "data", "train", "index") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    # parts of a text on lines of their own are one text
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    messages = QUOTED_MESSAGE.findall((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(messages) > 8
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in code, message


@pytest.mark.parametrize("page", ["findings.md", "benchmark-results.md", "../README.md"])
def test_findings_and_comparisons_are_those_of_scripts_and_records(page):
    assert is_up_to_date(page), "python scripts/write_docs.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < README_MAX_LINES


@pytest.mark.parametrize("page", load_write_docs().PAGES)
def test_generated_pages_say_so(page):
    # that their content is up to date, tests/cli/test_main.py and tests/train/test_recipes.py check
    sentence = "by scripts/write_docs.py" if page.endswith("README.md") else "Written by `python scripts/write_docs.py`"
    assert sentence in (ROOT / "docs" / page).read_text(encoding="utf-8")
