"""A file becomes a model of the catalogue: looked through, digested, sealed, and only then listed.

All that is slow is done by `prepare`, outside every Work; `add_prepared` is the row.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import gguf

from sublet.base.store import Work
from sublet.shops.models import keys, service
from sublet.shops.models.model import Access, Model, ModelInvalid, NewModel, WeightsChanged

_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model whose file is known, and sealed where it is to be."""

    new: NewModel
    wrapped: keys.WrappedKey | None

    def discard(self) -> None:
        """It is not added after all: what was sealed for it goes, an open file stays where it is."""
        if self.wrapped is not None:
            Path(self.new.path).unlink(missing_ok=True)


def prepare(
    new: NewModel,
    *,
    folder: Path | None,
    key: keys.KeyEncryptionKey | None,
    key_id: str,
) -> Prepared:
    """Read the file through. Slow, outside a Work; nothing is on the catalogue yet.

    `new.sha256`: what it should be, or empty. `folder`, `key`, `key_id`: where and with what a
    sealed one is kept. Raises ModelInvalid naming the field, WeightsChanged, SealingKeyMissing.
    """
    service.check(new)
    if new.access is Access.SEALED and (folder is None or key is None):
        raise keys.SealingKeyMissing()
    source = Path(new.path)
    try:
        _check_file(source, new)
        if new.access is Access.OPEN:
            sha256, size = service.digest(source)
            made = replace(new, path=str(source.resolve()), sha256=sha256, size_bytes=size)
            wrapped = None
        else:
            assert folder is not None
            assert key is not None
            sealed = keys.import_sealed(
                key, source=source, folder=folder, model=new.name, key_id=key_id
            )
            made = replace(
                new,
                path=str(sealed.path.resolve()),
                sha256=sealed.sha256,
                size_bytes=sealed.size_bytes,
            )
            wrapped = sealed.wrapped
    except OSError as error:
        raise ModelInvalid(
            f"{source} cannot be read or sealed: {error.strerror or error}.", param="path"
        ) from error
    prepared = Prepared(new=made, wrapped=wrapped)
    if new.sha256 and new.sha256 != made.sha256:
        prepared.discard()
        raise WeightsChanged(
            f"{source} is not the file that was meant: its sha256 is {made.sha256}.",
            param="sha256",
        )
    return prepared


def add_prepared(work: Work, prepared: Prepared) -> Model:
    """Put it on the catalogue, with its key. Raises ModelExists: then `discard` it."""
    model = service.add_model(work, prepared.new)
    if prepared.wrapped is not None:
        keys.keep(work, prepared.wrapped)
    return model


def _check_file(path: Path, new: NewModel) -> None:
    """It is a model file, of at least that context. Whatever else lies there is not told apart: its
    digest, and by a download its bytes, are for models only."""
    # Not to be waited for: a pipe or a device may lie there, and opening one can take for ever.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        if not is_file or file.read(len(_MAGIC)) != _MAGIC:
            raise ModelInvalid(f"{path} is not a GGUF file.", param="path")
    trained = _trained_context(path)
    if trained is not None and new.context > trained:
        raise ModelInvalid(
            f"`context` is at most what the model was trained for: {trained}.", param="context"
        )


def _trained_context(path: Path) -> int | None:
    """What the file itself says; None: it does not."""
    try:
        fields = gguf.GGUFReader(path).fields
        architecture = fields[gguf.Keys.General.ARCHITECTURE].contents()
        found = fields.get(gguf.Keys.LLM.CONTEXT_LENGTH.format(arch=architecture))
        return None if found is None else int(found.contents())
    except (ValueError, LookupError, OverflowError, TypeError, RecursionError) as error:
        raise ModelInvalid(f"{path} is no GGUF file that can be read.", param="path") from error
