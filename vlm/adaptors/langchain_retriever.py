"""An index as a retriever of LangChain: the captions of the nearest images as documents."""

from typing import TYPE_CHECKING, Any

from vlm.api.index import SearchIndex
from vlm.errors import UsageError

if TYPE_CHECKING:
    from langchain_core.retrievers import BaseRetriever  # pyright: ignore[reportMissingImports]


def as_retriever(index: SearchIndex, *, top: int = 10, **search: Any) -> "BaseRetriever":
    """A retriever whose documents are captions, with uid, score, path and the row's own metadata.

    search: more of what `index.search` takes, such as `where="year > 2020"`.

    Raises:
        UsageError: langchain-core is not installed.
    """
    try:
        from langchain_core.documents import Document  # pyright: ignore[reportMissingImports]
        from langchain_core.retrievers import BaseRetriever  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("LangChain is not installed: pip install langchain-core.") from error

    # defined here, since its base class is only there where LangChain is installed
    class IndexRetriever(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            documents: list[Document] = []
            for hit in index.search(query, top=top, **search):
                metadata = {**hit.metadata, "uid": hit.uid, "score": hit.score, "path": hit.path}
                documents.append(Document(page_content=hit.caption, id=hit.uid, metadata=metadata))
            return documents

    return IndexRetriever()
