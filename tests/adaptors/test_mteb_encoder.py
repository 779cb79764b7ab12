"""mteb's own evaluation code through the adaptor. Opt-in: skips without mteb (pip install mteb, then this file)."""

import io
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

import vlm
from vlm.adaptors.mteb_encoder import MtebEncoder
from vlm.data.sources.source import SceneOptions, SourceOptions
from vlm.data.sources.source_registry import open_source

NUM_PAIRS = 60


@pytest.fixture(scope="module")
def pairs():
    """Drawn images with their captions."""
    source = open_source("scenes", SourceOptions(scenes=SceneOptions(number=NUM_PAIRS, pixels=32, is_distinct=True)))
    read = [source.read(number) for number in range(NUM_PAIRS)]
    return [Image.open(io.BytesIO(pair.image)).convert("RGB") for pair in read], [
        pair.captions["en"][0] for pair in read
    ]


class TestCalls:
    """What does not need mteb."""

    def test_batches_of_texts_of_images_and_of_both(self, model, pairs):
        images, texts = pairs
        encoder = MtebEncoder(model)
        text_rows = encoder.encode([{"text": texts[:4]}, {"text": texts[4:6]}])  # pyright: ignore[reportArgumentType]
        image_rows = encoder.encode([{"image": images[:6]}])  # pyright: ignore[reportArgumentType]
        both = encoder.encode([{"image": images[:6], "text": texts[:6]}])  # pyright: ignore[reportArgumentType]
        assert np.allclose(text_rows, model.embed_texts(texts[:6]), atol=1e-6)
        assert np.allclose(image_rows, model.embed_images(images[:6]), atol=1e-6)
        assert np.allclose(both, text_rows + image_rows, atol=1e-6)
        assert encoder.encode([]).shape == (0, model.embedding_size)  # pyright: ignore[reportArgumentType]

    def test_similarities_are_cosines(self, model):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
        cosines = MtebEncoder(model).similarity(a, b)
        expected = (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        assert np.allclose(cosines, expected, atol=1e-6)
        assert np.allclose(MtebEncoder(model).similarity_pairwise(a, b), np.diag(expected), atol=1e-6)

    def test_other_inputs_are_refused(self, model):
        with pytest.raises(vlm.UsageError, match="has audio; images or texts are needed"):
            MtebEncoder(model).encode([{"audio": [0]}])  # pyright: ignore[reportArgumentType]

    @pytest.mark.skipif(find_spec("mteb") is not None, reason="mteb is installed")
    def test_without_mteb_its_metadata_says_so(self, model):
        with pytest.raises(vlm.UsageError, match="pip install mteb"):
            _ = MtebEncoder(model).mteb_model_meta


# mteb and what it imports warn of much that is not ours
@pytest.mark.filterwarnings("ignore")
class TestEvaluation:
    """What mteb measures on local tasks is what we measure ourselves."""

    @pytest.fixture
    def mteb(self):
        return pytest.importorskip("mteb")

    def test_texts_find_images(self, mteb, model, folder, pairs):
        images, texts = pairs
        task = retrieval_task(images, texts)
        result = mteb.evaluate(MtebEncoder(folder), task, cache=None, co2_tracker=False, show_progress_bar=False)
        [scores] = result.task_results[0].scores["test"]
        cosines = model.similarity(images, texts).T
        order = np.argsort(-cosines, axis=1)
        for k in (1, 5, 10):
            expected = np.mean([number in order[number, :k] for number in range(NUM_PAIRS)])
            assert scores[f"recall_at_{k}"] == pytest.approx(expected, abs=1e-4)

    def test_classes_of_images(self, mteb, model, pairs):
        images, texts = pairs
        colours = ["red", "green", "blue", "yellow", "black", "white"]
        labels = [next((number for number, colour in enumerate(colours) if colour in text), 0) for text in texts]
        prompts = [f"a {colour} shape" for colour in colours]
        task = zero_shot_task(images, labels, prompts)
        result = mteb.evaluate(MtebEncoder(model), task, cache=None, co2_tracker=False, show_progress_bar=False)
        [scores] = result.task_results[0].scores["test"]
        classified = model.classify(images, dict(zip(colours, prompts, strict=True)), top=1)
        expected = np.mean([colours[label] == found.best for label, found in zip(labels, classified, strict=True)])
        assert scores["accuracy"] == pytest.approx(expected, abs=1e-4)


def metadata(kind, name, modalities, category, score):
    from mteb import TaskMetadata  # pyright: ignore[reportMissingImports]

    return TaskMetadata(
        type=kind,
        name=name,
        description="Drawn shapes.",
        dataset={"path": "local/shapes", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
        modalities=modalities,
        category=category,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
        reference=None,
    )


def retrieval_task(images, texts):
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from mteb.abstasks.retrieval import AbsTaskRetrieval  # pyright: ignore[reportMissingImports]
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # pyright: ignore[reportMissingImports]

    class ShapesRetrieval(AbsTaskRetrieval):
        def load_data(self, num_proc=None, **_):
            ids = [f"d{number}" for number in range(len(images))]
            queries = [f"q{number}" for number in range(len(texts))]
            split = RetrievalSplitData(
                queries=Dataset.from_dict({"id": queries, "text": texts, "modality": ["text"] * len(texts)}),
                corpus=Dataset.from_dict({"id": ids, "image": images, "modality": ["image"] * len(images)}),
                relevant_docs={query: {image: 1} for query, image in zip(queries, ids, strict=True)},
                top_ranked=None,
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    ShapesRetrieval.metadata = metadata("Any2AnyRetrieval", "ShapesT2I", ["image", "text"], "t2i", "recall_at_1")
    return ShapesRetrieval()


def zero_shot_task(images, labels, prompts):
    from datasets import Dataset, DatasetDict  # pyright: ignore[reportMissingImports]
    from mteb.abstasks.zeroshot_classification import (  # pyright: ignore[reportMissingImports]
        AbsTaskZeroShotClassification,
    )

    class ShapesZeroShot(AbsTaskZeroShotClassification):
        def load_data(self, num_proc=None, **_):
            self.dataset = DatasetDict({"test": Dataset.from_dict({"image": images, "label": labels})})
            self.data_loaded = True

        def get_candidate_labels(self):
            return prompts

    ShapesZeroShot.metadata = metadata("ZeroShotClassification", "ShapesZeroShot", ["image", "text"], "i2t", "accuracy")
    return ShapesZeroShot()
