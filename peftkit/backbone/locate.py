"""From a reference to a folder on this machine; GGUF files and pickles are converted once into the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from peftkit.backbone.efficientnet import write_lite0
from peftkit.backbone.quiet import quiet
from peftkit.base import embedded, identity, ref
from peftkit.base.places import known_places
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.errors import BaseError
from peftkit.events import Note, Report, silent

# Raise this when the conversion writes other bytes than before: old conversions are then made again.
CONVERSION = 1


def locate(spec: BaseSpec, cache: Path, report: Report = silent, *, weights: bool = True) -> LocatedBase:
    """Find a base's files, downloading or converting them when needed; without `weights`, its config and tokenizer.

    Raises BaseError when the base does not exist or cannot be had.
    """
    reference = ref.parse(spec)
    if reference.kind == "hub":
        return ref.located(reference, ref.snapshot(reference, weights))
    if reference.kind == "folder":
        return ref.located(reference, Path(reference.source).expanduser().resolve())
    if reference.kind == "embedded":
        return ref.located(reference, _embedded(reference.source.removeprefix("embedded:"), cache, report))
    gguf = Path(reference.source).expanduser().resolve()
    return ref.located(reference, convert_gguf(gguf, cache, report))


def _embedded(name: str, cache: Path, report: Report) -> Path:
    if not embedded.place_of(name, cache).exists():
        report(Note(f"fetching the embedded base {name} ({embedded.EMBEDDED[name].megabytes} MB, once)"))
    files = embedded.fetch(name, cache)
    if files.suffix == ".gguf":
        return convert_gguf(files, cache, report)
    return _convert(files, cache, write_lite0, report) if files.suffix == ".pth" else files


def locate_again(source: str, revision: str | None, record: str | None, cache: Path) -> BaseSpec:
    """The base that an adapter's manifest names: where this machine last saw its content, else the source itself.

    Raises BaseError for the name of a local base that this machine has not seen.
    """
    places = known_places(record, cache) if record else []
    if places and source not in places:
        return BaseSpec(
            source=places[0], revision=revision if ref.parse(BaseSpec(source=places[0])).kind == "hub" else None
        )
    try:
        ref.parse(BaseSpec(source=source, revision=revision))
    except BaseError as error:
        raise BaseError(
            f"the base {source!r} was a folder or file, and is not known on this machine",
            expected=f"a base with the record {record}",
            hint="name it once with --base, and it will be found again by its content",
        ) from error
    return BaseSpec(source=source, revision=revision)


def license_of(base: LocatedBase) -> str | None:
    """The licence that a base states; None when it states none."""
    if base.kind == "embedded":
        return embedded.EMBEDDED[base.source.removeprefix("embedded:")].license
    return identity.license_of(base.folder)


def convert_gguf(gguf: Path, cache: Path, report: Report = silent) -> Path:
    """Dequantize a GGUF file into a float32 safetensors folder in the cache, once per content.

    float32 keeps every dequantized value exactly. Raises BaseError when transformers cannot read the file.
    """
    return _convert(gguf, cache, _write_dequantized, report)


def _convert(file: Path, cache: Path, write: Callable[[Path, Path], None], report: Report) -> Path:
    """The folder that `write` makes of `file`, once per content of the file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache / "converted" / f"{file.stem}-{digest[:16]}-v{CONVERSION}"
    if target.exists():
        return target
    report(Note(f"converting {file.name} to safetensors (once)"))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        write(file, scratch)
        try:
            os.rename(scratch, target)
        except OSError:  # another process finished the same conversion first; its bytes are the same
            if not target.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_dequantized(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, **options)
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
    except Exception as error:  # a broken file makes the reader raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseError(
            f"{gguf.name} cannot be converted: {reason}",
            expected="a GGUF file of an architecture that transformers reads",
            hint="use the safetensors upload of the same model",
        ) from error
