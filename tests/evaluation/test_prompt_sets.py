import json
import subprocess
import sys

import open_clip.zero_shot_metadata
import pytest

from vlm.errors import UsageError
from vlm.evaluation.class_vectors import (
    TEMPLATE_SETS,
    described_prompts,
    read_by_language,
    read_class_list,
    read_descriptions,
    read_templates,
)


def test_sets_of_templates_go_by_name():
    for name in TEMPLATE_SETS:
        templates = read_templates([name])
        assert templates
        assert all("{}" in template for template in templates)
        assert len(set(templates)) == len(templates)
    functions = open_clip.zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES
    assert [text.replace("{}", "cat") for text in read_templates(["openai"])] == [make("cat") for make in functions]
    assert read_templates(["simple", "pets", "{}"])[-2:] == ["a photo of a {}, a type of pet.", "{}"]
    assert set(read_templates(["simple"])) < set(read_templates(["openai"]))
    cifar = read_templates(["cifar"])
    assert len(cifar) == 18
    assert {"a low contrast photo of the {}.", "a photo of a big {}."} < set(cifar)
    assert len(read_class_list("imagenet")) == 1000


def test_templates_of_imagenet_need_no_torch():
    script = "import sys; from vlm.evaluation.class_vectors import read_templates; read_templates(['openai']); "
    subprocess.run([sys.executable, "-c", script + "assert 'torch' not in sys.modules"], check=True)


def test_an_unknown_set_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match=r"'opneai', which is no file and none of openai, simple, .* has no \{\}"):
        read_templates(["opneai"])
    with pytest.raises(UsageError, match="imagenet for its 1,000"):
        read_class_list("imagnet")


def test_descriptions_come_by_class_name(tmp_path):
    path = tmp_path / "descriptions.json"
    path.write_text(
        json.dumps({"Grey_Heron": ["A grey heron wades.", "long legs", "is tall", "a grey wader"], "owl": ["big eyes"]})
    )
    descriptions = read_descriptions(path)
    assert described_prompts(["grey heron", "owl"], descriptions) == [
        [
            "A grey heron wades.",
            "grey heron, which has long legs",
            "grey heron, which is tall",
            "grey heron, which is a grey wader",
        ],
        ["owl, which has big eyes"],
    ]
    with pytest.raises(
        UsageError, match="1 of 2 classes have no description, as 'crane'; the descriptions are of 'Grey_Heron'"
    ):
        described_prompts(["owl", "crane"], descriptions)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no descriptions of classes"),
        ('{"owl": []}', "descriptions of 'owl' are not a list of sentences"),
        ('{"owl": "big eyes"}', "descriptions of 'owl' are not a list of sentences"),
        ('{"owl": ["big eyes", " "]}', "descriptions of 'owl' are not a list of sentences"),
    ],
)
def test_what_is_no_description_is_refused(tmp_path, content, message):
    path = tmp_path / "descriptions.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_descriptions(path)
    with pytest.raises(UsageError, match=r"no file 'nothing\.json' of descriptions"):
        read_descriptions("nothing.json")


def test_texts_come_by_language(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"en": ["cat", "dog"], "de": ["Katze", "Hund"]}))
    assert read_by_language(path, "class names") == {"en": ["cat", "dog"], "de": ["Katze", "Hund"]}
    assert read_by_language("cat,dog", "class names") is None
    path.write_text('{"en": "cat"}')
    with pytest.raises(UsageError, match="the class names in 'en' are not a list of texts"):
        read_by_language(path, "class names")
    path.write_text('["cat"]')
    with pytest.raises(UsageError, match="no class names by language"):
        read_by_language(path, "class names")
