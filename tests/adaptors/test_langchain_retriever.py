"""Our index as LangChain's retriever. Opt-in: skips without langchain-core."""

from importlib.util import find_spec

import pytest

import vlm
from vlm.adaptors.langchain_retriever import as_retriever


@pytest.fixture(scope="module")
def index(folder, scene_shards, tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    vlm.embed(folder, scene_shards / "val", root / "embeddings", workers=0)
    vlm.build_index(root / "embeddings", root / "index")
    with vlm.open_index(root / "index") as opened:
        yield opened


@pytest.mark.filterwarnings("ignore")
def test_documents_are_the_captions_of_the_nearest_images(index):
    pytest.importorskip("langchain_core")
    documents = as_retriever(index, top=3).invoke("a red circle")
    hits = list(index.search("a red circle", top=3))
    assert [document.page_content for document in documents] == [hit.caption for hit in hits]
    assert [document.metadata["uid"] for document in documents] == [hit.uid for hit in hits]
    assert documents[0].metadata["score"] == pytest.approx(hits[0].score)


@pytest.mark.skipif(find_spec("langchain_core") is not None, reason="langchain-core is installed")
def test_without_langchain_it_says_what_to_install(index):
    with pytest.raises(vlm.UsageError, match="pip install langchain-core"):
        as_retriever(index)
