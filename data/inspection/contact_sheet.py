"""`vlm inspect --html`: an inspection as a page, with histograms and a contact sheet of samples."""

from vlm.data.inspection.findings import Inspection
from vlm.data.samples import UNNAMED
from vlm.pages import Provenance, render

_MAX_RECORDS = 100
_MAX_VALUES = 8


def contact_sheet(inspection: Inspection, *, title: str, provenance: Provenance | None = None) -> str:
    """The page: counts, damaged and unusable samples, histograms, metadata, and images with their captions."""
    languages = inspection.languages
    # in one table: a trait must not overwrite the count of a format of the same name
    traits = {name: count for name, count in inspection.traits.items() if name not in inspection.formats}
    return render(
        "contact_sheet.html",
        provenance=provenance,
        title=title,
        inspection=inspection,
        num_captions=sum(language.captions for language in languages.values()),
        num_truncated=sum(language.cut for language in languages.values()),
        is_multilingual=len(languages) > 1 or any(code != UNNAMED for code in languages),
        formats_and_modes=inspection.formats | traits,
        max_records=_MAX_RECORDS,
        max_values=_MAX_VALUES,
    )
