"""What a killed writer left behind is taken back or removed, so that the folder is again what its manifest says."""

from pathlib import Path

from vlm.index.catalogue_writing import is_ahead, restore_catalogue
from vlm.index.layout import SEGMENTS, TOMBSTONES, Details, WritePoint, unhindered
from vlm.manifest import Manifest, read_manifest


def recover(folder: Path, *, reached: WritePoint = unhindered) -> None:
    """Bring a folder back to its manifest's generation; only for the one who holds the writer's lock.

    May be killed and repeated. Readers notice nothing: what is removed no newer manifest names.

    Raises:
        VlmError: the catalogue is damaged or the disk is full.
    """
    manifest = read_manifest(folder, "index")
    details = Details.from_manifest(manifest, folder)
    if is_ahead(folder / details.catalogue, generation=manifest.generation):
        reached("taking back the catalogue")
        restore_catalogue(folder / details.catalogue, generation=manifest.generation)
    sweep(folder, manifest, details, reached=reached)


def sweep(folder: Path, manifest: Manifest, details: Details, *, reached: WritePoint = unhindered) -> None:
    """Unlink the strays; who has one of them open keeps it."""
    for path in strays(folder, manifest, details):
        reached(f"removing {path.name}")
        path.unlink(missing_ok=True)


def strays(folder: Path, manifest: Manifest, details: Details) -> list[Path]:
    """Files of the index that its manifest does not name: of an older generation, or of one that was never finished."""
    named = {folder / name for name in (*manifest.files, details.catalogue)}
    journal = folder / f"{details.catalogue}-journal"
    inside = [path for name in (SEGMENTS, TOMBSTONES) if (folder / name).is_dir() for path in (folder / name).iterdir()]
    beside = [path for pattern in ("catalogue-*", ".manifest.json.*.part") for path in folder.glob(pattern)]
    return sorted(path for path in (*inside, *beside) if path not in named and path != journal)
