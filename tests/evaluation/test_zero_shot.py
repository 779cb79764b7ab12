import io
import tarfile

import numpy as np
import pytest
import torch

from tests.data.tar_fixture import tiny_image
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation.class_vectors import (
    class_list_beside,
    class_texts,
    read_class_list,
    read_class_names,
    read_templates,
)
from vlm.evaluation.evaluation_set import label_of
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.zero_shot import (
    evaluate_zero_shot,
    measure_zero_shot,
    open_labelled_set,
    text_classifier,
)

NAMES = ["cat", "dog", "car"]


class Reader:
    """Knows each class by its word, and so classifies perfectly."""

    name = "reader"
    fingerprint = "reader"
    view = EvalTransform(size=16)
    logit_scale = 100.0

    def embed_texts(self, texts):
        rows = [[float(name in text) for name in NAMES] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows) + 1e-6, dim=-1)

    def embed_images(self, images):
        """Sees a dog in every image."""
        return self.embed_texts(["dog"] * len(images))


def classifier_of(names, templates):
    return text_classifier(EvaluatedModel(Reader()), class_texts(names, templates)[0])


def test_a_model_that_knows_the_words_is_right_everywhere():
    classifier = classifier_of(NAMES, ("a photo of a {}.", "{}"))
    images = np.eye(3, dtype=np.float32)
    found = measure_zero_shot([(images, ["cat", "dog", "car"])], classifier, NAMES)
    assert (found.top1, found.mean_per_class, found.num_images) == (1.0, 1.0, 3)


def test_mean_per_class_weighs_rare_classes_alike():
    classifier = np.eye(3, dtype=np.float32)
    images = np.eye(3, dtype=np.float32)[[0, 0, 0, 0]]
    found = measure_zero_shot([(images, ["cat", "cat", "cat", "dog"])], classifier, NAMES)
    assert found.top1 == pytest.approx(0.75)
    assert found.mean_per_class == pytest.approx(0.5)
    assert found.majority == pytest.approx(0.75)
    assert {score.name: score.accuracy for score in found.classes} == {"cat": 1.0, "dog": 0.0}


def test_a_classifier_that_cannot_tell_gets_chance_level():
    found = measure_zero_shot([(np.ones((1, 2), np.float32), ["cat"])], np.ones((3, 2), np.float32), NAMES)
    assert found.top1 == pytest.approx(1 / 3)


def test_an_unknown_class_is_refused_by_name():
    with pytest.raises(UsageError, match="bird"):
        measure_zero_shot([(np.ones((1, 3), np.float32), ["bird"])], np.eye(3, dtype=np.float32), NAMES)


def test_a_template_without_a_place_is_refused():
    with pytest.raises(UsageError, match=r"no \{\} for"):
        classifier_of(NAMES, ("a photo",))


def test_other_braces_of_a_template_are_text():
    for template in ("a {}, a kind of {kind}.", "a {} in {brackets", "{} }"):
        assert classifier_of(NAMES, (template,)).shape == (3, 3)


def test_class_names_come_one_a_line_whatever_they_contain_and_each_once(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\ufeffoak, English oak\nfir\n\nwalnut, juglans\nfir\n", encoding="utf-8")
    assert read_class_names(str(names)) == ["oak, English oak", "fir", "walnut, juglans"]
    assert read_class_names("cat, dog,cat") == ["cat", "dog"]
    assert read_class_names(",".join(f"class {number}" for number in range(1000)))[-1] == "class 999"
    with pytest.raises(UsageError, match="no file 'nothing'"):
        read_class_names("nothing")


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_numbers_stay_those_of_the_lines_when_a_class_has_no_name(tmp_path):
    """CLIP_benchmark's list of one data set lacks a line: the names below it must not take its number."""
    tar_of(tmp_path / "0.tar", [(f"{n}.{end}", part) for n in range(3) for end, part in cls_sample(n, f"{n}")])
    (tmp_path / "classnames.txt").write_text("jug\n\ncup\n\n")
    assert read_class_list(str(tmp_path / "classnames.txt")) == ["jug", "", "cup"]
    with pytest.raises(UsageError, match="'1' is of class 1, and line 2 of the class names is empty"):
        labels_at(tmp_path / "0.tar", "cls", class_list=class_list_beside(str(tmp_path / "0.tar")))


def test_names_and_templates_at_the_root_of_a_benchmark_are_used(tmp_path, logged):
    """CLIP_benchmark's layout: the tars of a split lie one folder below the names and the templates."""
    (tmp_path / "test").mkdir()
    tar_of(tmp_path / "test" / "0.tar", [(f"{n}.{end}", part) for n in range(4) for end, part in cls_sample(n, "1")])
    (tmp_path / "test" / "nshards.txt").write_text("1")
    evaluate_zero_shot(Reader(), str(tmp_path / "test"), label="cls")
    assert "The classes have numbers for names (1)" in logged.text
    logged.clear()
    (tmp_path / "classnames.txt").write_text("cat\ndog\ncar\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\nno {c}?\n")
    zero_shot = evaluate_zero_shot(Reader(), str(tmp_path / "test"), label="cls")
    assert (zero_shot.top1, [score.name for score in zero_shot.classes]) == (1.0, ["dog"])
    assert "Prompt templates: the 2 of" in logged.text
    assert "numbers for names" not in logged.text


def test_templates_come_from_a_file_as_well(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {c}.\n\n{} in {brackets}\n")
    assert read_templates(["{}", str(file)]) == ["{}", "a photo of a {c}.", "{} in {brackets}"]
    assert np.array_equal(*(classifier_of(NAMES, (text,)) for text in ("a {c}", "a {}")))
    file.write_text('{"cat": ["a small tiger"]}')
    with pytest.raises(UsageError, match=r"line 1 of .*templates.txt\) has no \{\} for"):
        read_templates([str(file)])


@pytest.mark.parametrize("content", ["1 3", "[1, 3]", "3;1"])
def test_an_image_of_several_classes_is_right_with_any(tmp_path, content):
    tar_of(tmp_path / "0.tar", [(f"0.{end}", part) for end, part in cls_sample(0, content)])
    (tmp_path / "classnames.txt").write_text("car\ndog\ntree\ncat\n")
    zero_shot = evaluate_zero_shot(Reader(), str(tmp_path / "0.tar"), label="cls")
    assert (zero_shot.top1, zero_shot.num_images, zero_shot.num_classes) == (1.0, 1, 4)
    assert {score.name for score in zero_shot.classes} == {"cat", "dog"}


@pytest.mark.parametrize(("value", "held"), [(None, "nothing"), (["cat", "dog"], "several values")])
def test_a_label_that_is_no_single_class_is_refused(value, held):
    with pytest.raises(UsageError, match=f"'label' of sample 'k' holds {held}"):
        label_of({"label": value}, "label", "k")


def cls_sample(number, content):
    return (("cls", content.encode()), ("jpg", tiny_image(number)))


def labels_at(url, label="label", *, class_list=()):
    labels = open_labelled_set(str(url), label=label, class_names=class_list).true_labels
    return [name for (name,) in labels]


def test_key_cls_is_a_class_by_number_or_by_name(tmp_path):
    numbered = [part for n in range(4) for part in ((f"{n}.cls", str(n % 3).encode()), (f"{n}.jpg", tiny_image(n)))]
    named = [part for n in range(2) for part in ((f"{n}.jpg", tiny_image(n)), (f"{n}.cls", b"jug\n"))]
    tar_of(tmp_path / "0.tar", numbered)
    (tmp_path / "named").mkdir()
    tar_of(tmp_path / "named" / "0.tar", named)
    assert labels_at(tmp_path / "named", "cls") == ["jug", "jug"]
    assert class_list_beside(str(tmp_path / "0.tar")) == []
    (tmp_path / "classnames.txt").write_text("jug\ncup\njug\n")
    names = class_list_beside(str(tmp_path / "0.tar"))
    assert labels_at(tmp_path / "0.tar", "cls", class_list=names) == ["jug", "cup", "jug", "jug"]
    with pytest.raises(UsageError, match="is of class 2, but there are 2 class names"):
        labels_at(tmp_path / "0.tar", "cls", class_list=names[:2])
    with pytest.raises(UsageError, match="no metadata 'label'"):
        labels_at(tmp_path / "0.tar")


def test_what_pack_reads_is_measured_as_well(tmp_path):
    """Class folders, the same in a tar, and a table with a column of labels."""
    folder = tmp_path / "set"
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{number}.jpg").write_bytes(tiny_image(number))
    tar_of(tmp_path / "all.tar", [(f"{name}/{n}.jpg", tiny_image(n)) for n, name in enumerate(("cat", "dog"))])
    assert labels_at(folder) == labels_at(tmp_path / "all.tar") == ["cat", "dog"]
    (folder / "captions.csv").write_text("file,label\ncat/0.jpg,tom\ndog/1.jpg,rex\n")
    assert labels_at(folder) == ["tom", "rex"]
    (folder / "captions.csv").write_text("file,caption,breed\ncat/0.jpg,a cat,tom\ndog/1.jpg,a dog,rex\n")
    assert labels_at(folder, "breed") == ["tom", "rex"]
