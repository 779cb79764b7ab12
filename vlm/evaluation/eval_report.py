"""What an evaluation found, as one self-contained page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlm.evaluation.caption_accuracy import CaptionTruth
from vlm.evaluation.retrieval import Direction, Retrieval
from vlm.evaluation.zero_shot import ZeroShot
from vlm.files import write_text

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--bar:#3b7dd8}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.b{background:linear-gradient(90deg,var(--bar) var(--p),#8882 var(--p));height:.6rem;border-radius:.3rem;min-width:8rem}
.bad{color:#c0392b}.good{color:#2a8a4a}small{opacity:.7}
"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything measured of one model; None where it was not asked for."""

    model: str
    fingerprint: str
    retrieval: Retrieval | None = None
    zero_shot: ZeroShot | None = None
    caption_truth: CaptionTruth | None = None


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write the page atomically."""
    parts = [f"<h1>{escape(evaluation.model)}</h1><small>fingerprint {evaluation.fingerprint}</small>"]
    if evaluation.retrieval:
        parts.append(_retrieval(evaluation.retrieval))
    if evaluation.zero_shot:
        parts.append(_zero_shot(evaluation.zero_shot))
    if evaluation.caption_truth:
        parts.append(_caption_truth(evaluation.caption_truth))
    page = (
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Evaluation</title>"
    )
    write_text(path, f"{page}<style>{_STYLE}</style>{''.join(parts)}\n")


def _retrieval(found: Retrieval) -> str:
    def row(name: str, direction: Direction) -> list[str]:
        shares = [f"{value:.1%}" for value in direction.recall.values()]
        return [name, *shares, f"{direction.median_rank:g}", f"{direction.num_queries:,}", _bar(direction.recall[1])]

    head = ["", *(f"recall@{k}" for k in found.text_to_image.recall), "median rank", "queries", "recall@1"]
    rows = [row("text → image", found.text_to_image), row("image → text", found.image_to_text)]
    facts = f"{found.num_images:,} pictures, {found.num_texts:,} captions, {found.num_bad:,} unusable samples"
    return f"<h2>Retrieval</h2><p>{facts}</p>{_table(head, rows)}"


def _zero_shot(found: ZeroShot) -> str:
    facts = (
        f"top-1 <b>{found.top1:.1%}</b>, top-5 {found.top5:.1%}, mean per class {found.mean_per_class:.1%}; "
        f"the largest class alone is {found.majority:.1%}. {found.num_images:,} pictures, {found.num_classes} classes."
    )
    ordered = sorted(found.classes, key=lambda score: -score.num_images)
    rows = [[escape(s.name), f"{s.num_images:,}", f"{s.accuracy:.1%}", _bar(s.accuracy)] for s in ordered]
    return f"<h2>Zero-shot classification</h2><p>{facts}</p>{_table(['class', 'pictures', 'right', ''], rows)}"


def _caption_truth(found: CaptionTruth) -> str:
    rows = [
        [escape(e["key"]), escape(e["caption"]), _verdict(e["true"]), escape(str(e["reason"] or ""))]
        for e in found.examples
    ]
    wrong = ", ".join(f"{escape(name)} {count}" for name, count in found.wrong.items()) or "none"
    facts = f"<b>{found.true:.1%}</b> of {found.num_captions:,} captions are true. Facts said wrongly: {wrong}."
    return f"<h2>Captions</h2><p>{facts}</p>{_table(['scene', 'caption', 'verdict', 'why'], rows)}"


def _verdict(is_true: bool) -> str:
    return "<span class=good>true</span>" if is_true else "<span class=bad>false</span>"


def _bar(share: float) -> str:
    return f"<div class=b style='--p:{share:.1%}'></div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = [" class=n" if value[:1].isdigit() else "" for value in values]
        return "".join(f"<{tag}{kind}>{value}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"
