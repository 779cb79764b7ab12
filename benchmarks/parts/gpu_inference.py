"""What the GPU benchmark measures besides training: decoding, embedding, captioning, exact search, open_clip's step."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import open_clip
import torch
from parts.gpu_training import Row, Settings
from torch.nn import functional as F

from vlm.data.decode import EncodedImage
from vlm.data.gpu_decode import check_decoder, decode_views_on_device, prepare_view
from vlm.data.shards import expand_shards
from vlm.data.tar import ShardReader
from vlm.data.tokenizers import ClipTokenizer
from vlm.data.transforms import EvalTransform, RandomResizedCrop
from vlm.errors import UsageError
from vlm.models.caption_search import write_captions
from vlm.models.decoding_options import DecodingOptions
from vlm.models.load import choose_device
from vlm.models.model import VisionLanguageModel, autocast_to, build_network, fit_to_tokenizer, model_config

_TEXT = "a photo of two green stars beside a red circle"
_CAPTION_TOKENS = 32
_TOP = 10


def open_clip_step(settings: Settings, architecture: str) -> Iterator[Row]:
    """Training steps of open_clip's own network and loss on one batch in memory, as its trainer does them in bf16."""
    device = choose_device("auto")
    network: Any = build_network(_config(architecture)).to(device)
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.2)
    called = torch.compile(network) if settings.is_compiled else network
    images, tokens = _random_batch(settings, network, device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast_to(torch.bfloat16, device):
            output = called(images, tokens)
            value = loss(output["image_features"], output["text_features"], output["logit_scale"])
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            network.logit_scale.clamp_(0, float(np.log(100)))
        value.item()

    rate = settings.batch * _rate(step, settings, device)
    yield {"what": "open_clip, one batch in memory", "samples_per_second": rate}


def decode(settings: Settings, architecture: str) -> Iterator[Row]:
    """JPEGs to views: on one core of the CPU, and on the device where it has a decoder; with how far pixels differ."""
    device = choose_device("auto")
    view = RandomResizedCrop(size=_size(architecture))
    images = [EncodedImage(jpeg) for jpeg in _jpegs(settings)]
    rng = np.random.default_rng(0)
    crops = [view.draw(image.width, image.height, rng) for image in images]
    pairs = list(zip(images, crops, strict=True))
    rate = len(images) * _rate(lambda: [view.show(image, crop) for image, crop in pairs], settings, device)
    yield {"what": "decode on one core", "samples_per_second": rate}
    if device.type == "cuda":
        try:
            check_decoder(device)
        except UsageError as error:
            yield {"what": "decode on the device", "note": str(error)}
            return

    prepared = [prepare_view(image, crop, view) for image, crop in pairs]
    rate = len(images) * _rate(lambda: decode_views_on_device(prepared, view, device), settings, device)
    yield {"what": "decode on the device", "samples_per_second": rate}
    shown = decode_views_on_device(prepared, view, device).images.cpu().float()
    expected = torch.stack([torch.from_numpy(view.show(image, crop)) for image, crop in pairs]).float()
    yield {"what": "decode, mean difference of pixels", "value": float((shown - expected).abs().mean())}


def embed(settings: Settings, architecture: str) -> Iterator[Row]:
    """Images and texts embedded in bf16, and the least cosine of these vectors with those of float32 on the CPU."""
    torch.manual_seed(0)
    network = build_network(_config(architecture)).eval()
    size = _size(architecture)
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (settings.batch, 3, size, size), generator=drawn, dtype=torch.uint8)
    texts = [f"{_TEXT} number {number}" for number in range(settings.batch)]
    few = min(8, settings.batch)
    exact = _model(architecture, network, torch.device("cpu"), torch.float32)
    expected = exact.embed_images(images[:few]), exact.embed_texts(texts[:few])

    device = choose_device("auto")
    model = _model(architecture, network.to(device), device, torch.bfloat16)
    moved = images.to(device)
    for what, call in (
        ("images embedded", lambda: model.embed_images(moved)),
        ("texts embedded", lambda: model.embed_texts(texts)),
    ):
        yield {"what": what, "samples_per_second": settings.batch * _rate(call, settings, device)}
    vectors = model.embed_images(moved[:few]), model.embed_texts(texts[:few])
    cosines = [float(F.cosine_similarity(one, other).min()) for one, other in zip(vectors, expected, strict=True)]
    yield {"what": "least cosine with float32 on the CPU", "value": min(cosines)}


def caption(settings: Settings, architecture: str) -> Iterator[Row]:
    """Captions of 32 tokens by greedy decoding and by four beams, with cached keys and values, in bf16."""
    device = choose_device("auto")
    torch.manual_seed(0)
    network: Any = build_network(_config("tiny-coca" if settings.is_tiny else "coca_ViT-B-32")).to(device).eval()
    rows = max(2, settings.batch // 8)
    images, _ = _random_batch(settings, network, device, rows=rows)
    for beams in (1, 4):
        options = DecodingOptions(beams=beams, min_length=_CAPTION_TOKENS - 1, max_length=_CAPTION_TOKENS)

        def write(options: DecodingOptions = options) -> None:
            with torch.inference_mode(), autocast_to(torch.bfloat16, device):
                write_captions(network, images, ClipTokenizer(), options)

        way = f"captions, {'greedy' if beams == 1 else f'{beams} beams'}, batch {rows}"
        yield {"what": way, "samples_per_second": rows * _rate(write, settings, device)}


def search(settings: Settings, architecture: str) -> Iterator[Row]:
    """Exact search by FAISS's flat index on the CPU and by torch on the device; the share of equal results."""
    import faiss

    device = choose_device("auto")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((settings.rows, 512), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[: min(256, settings.rows)] + 0.05 * rng.standard_normal((1, 512), dtype=np.float32)
    index = faiss.IndexFlatIP(512)
    index.add(vectors)  # pyright: ignore[reportCallIssue]
    _, expected = index.search(queries, _TOP)  # pyright: ignore[reportCallIssue]
    rate = _rate(lambda: index.search(queries, _TOP), settings, torch.device("cpu"))  # pyright: ignore[reportCallIssue]
    yield {
        "what": f"exact search of {settings.rows:,} rows, FAISS on the CPU",
        "samples_per_second": len(queries) * rate,
    }

    rows, asked = torch.from_numpy(vectors).to(device), torch.from_numpy(queries).to(device)
    found = (asked @ rows.T).topk(_TOP).indices.cpu().numpy()
    rate = _rate(lambda: (asked @ rows.T).topk(_TOP).indices.cpu(), settings, device)
    yield {
        "what": f"exact search of {settings.rows:,} rows, torch on the device",
        "samples_per_second": len(queries) * rate,
    }
    yield {"what": "exact search, equal results", "value": float((found == expected).mean())}


def _config(architecture: str) -> Any:
    """Of an architecture, for CLIP's tokenizer."""
    return fit_to_tokenizer(model_config(architecture), ClipTokenizer())


def _size(architecture: str) -> int:
    return int(_config(architecture)["vision_cfg"]["image_size"])


def _model(architecture: str, network: Any, device: torch.device, precision: torch.dtype) -> VisionLanguageModel:
    return VisionLanguageModel(
        name=architecture,
        network=network,
        config=_config(architecture),
        view=EvalTransform(size=_size(architecture)),
        tokenizer=ClipTokenizer(),
        device=device,
        precision=precision,
    )


def _random_batch(
    settings: Settings, network: Any, device: torch.device, rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    size = network.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    images = torch.randn(rows or settings.batch, 3, side, side, device=device)
    tokens = torch.from_numpy(ClipTokenizer().encode([_TEXT] * len(images))).to(device)
    return images, tokens


def _jpegs(settings: Settings) -> list[bytes]:
    """As many JPEGs as a batch has, from the shards."""
    jpegs: list[bytes] = []
    for shard in expand_shards(settings.shards):
        reader = ShardReader(shard)
        for number in range(len(reader.index)):
            jpegs.append(reader.read(number).image)
        reader.close()
        if len(jpegs) >= settings.batch:
            break
    return list(itertools.islice(itertools.cycle(jpegs), settings.batch))


def _rate(work: Callable[[], object], settings: Settings, device: torch.device) -> float:
    """Calls a second over `settings.seconds` after the warm-up; the device has finished both times."""
    for _ in range(settings.warm_up):
        work()
    _finish(device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < settings.seconds:
        work()
        calls += 1
        _finish(device)
    return calls / (time.perf_counter() - began)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
