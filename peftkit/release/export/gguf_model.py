"""A merged model as one GGUF file, from its Hugging Face folder; tensors are streamed and rounded once.

Metadata and tokenizer come from the folder, or from the base's own GGUF file where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peftkit.base.dense import Dense, dense_tensors
from peftkit.base.raw import Array, json_file
from peftkit.errors import DeltaError
from peftkit.events import Report, silent
from peftkit.release.export import gguf_file
from peftkit.release.export.gguf_file import FILE_TYPES, Dtype, Tensor, Written, check_dtype, check_new, storable
from peftkit.release.export.gguf_metadata import add_hyperparameters, rope_factors
from peftkit.release.export.gguf_names import Layout, Target, interleaved, layout
from peftkit.release.export.gguf_tokenizer import add_tokenizer, pre_tokenizer

_STEP = 1 << 21
"""Numbers of a tensor that are in memory at once."""
_ROPE_FACTORS = "rope_freqs.weight"
_VOCABULARY = {"token_embd.weight", "output.weight"}


def write_model_gguf(
    folder: Path,
    out: Path,
    dtype: Dtype = "bf16",
    *,
    name: str | None = None,
    like: Path | None = None,
    report: Report = silent,
) -> Written:
    """Write the model in `folder` (config, safetensors, tokenizer) as a GGUF file.

    Matrices are stored as `dtype`, vectors as float32. With `like`, the base's own GGUF file, metadata and tokenizer
    are copied from it; only the name of the pre-tokenizer follows the folder's tokenizer.json where llama.cpp knows it,
    for that is what the adapter was trained with. `like` is left out, with a note, when the model has more or fewer
    tokens. Raises DeltaError, before anything is written, for architectures,
    settings and tokenizers that are not tested or that llama.cpp would compute differently.
    """
    check_dtype(dtype)
    check_new(out)
    config = json_file(folder / "config.json")
    plan = layout(config)
    tensors = [*_tensors(folder, plan, dtype), *_rope_tensor(config, plan)]
    notes: list[str] = []
    donor = _donor(like, plan, tensors, notes) if like is not None else None
    pre = _pre_of_donor(donor, folder, notes) if donor is not None else None

    def describe(writer: gguf.GGUFWriter) -> None:
        if donor is None:
            writer.add_type(gguf.GGUFType.MODEL)
            add_hyperparameters(writer, config, plan)
            add_tokenizer(writer, folder, _rows(tensors))
        else:
            gguf_file.copied(donor, writer, _REPLACED if pre is None else _REPLACED | {gguf.Keys.Tokenizer.PRE})
            if pre is not None:
                writer.add_tokenizer_pre(pre)
        writer.add_name(name or folder.name)
        writer.add_file_type(FILE_TYPES[dtype])
        if dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    return gguf_file.write(out, plan.family.arch, describe, tensors, notes=tuple(notes), report=report)


_REPLACED = frozenset({"general.architecture", "general.name", "general.file_type", "general.quantization_version"})


def _tensors(folder: Path, plan: Layout, dtype: Dtype) -> Iterator[Tensor]:
    for name, dense in sorted(dense_tensors(folder).items()):
        target = plan.target(name)
        if target is not None:
            stored = storable(dense.shape, dtype)
            yield Tensor(target.name, dense.shape, stored, partial(_blocks, dense, target))


def _blocks(dense: Dense, target: Target) -> Iterator[Array]:
    """Rows of a tensor as llama.cpp wants them; interleaved ones by whole heads."""
    rows, columns = (1, dense.shape[0]) if len(dense.shape) == 1 else dense.shape
    if target.head_rows is not None and len(dense.shape) == 1:
        rows, columns = columns, 1
    unit = target.head_rows or 1
    step = max(_STEP // columns // unit, 1) * unit
    for first in range(0, rows, step):
        last = min(first + step, rows)
        block = dense.part(first * columns, last * columns).reshape(last - first, columns)
        if target.head_rows is not None:
            block = interleaved(block, target.head_rows)
        yield block.astype(np.float32) + np.float32(target.offset) if target.offset else block


def _rope_tensor(config: Mapping[str, Any], plan: Layout) -> Iterable[Tensor]:
    factors = rope_factors(config, plan)
    if factors is None:
        return []
    return [Tensor(_ROPE_FACTORS, factors.shape, "f32", lambda: [factors])]


def _rows(tensors: list[Tensor]) -> int:
    found = [tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight"]
    if not found:
        raise DeltaError("the model has no token embedding", expected="a whole model folder, as merge writes it")
    return found[0]


def _donor(like: Path, plan: Layout, tensors: list[Tensor], notes: list[str]) -> Any:
    """The base's own file, after a check that it is a file of this architecture with these tensors.

    None, with a note, when only the number of tokens differs: its list of tokens is not the model's then.
    """
    reader = gguf.GGUFReader(like)
    arch = reader.fields["general.architecture"].contents()
    theirs = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    ours = {tensor.name: tensor.shape for tensor in tensors}
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if "output.weight" not in theirs:  # a merge may part the head of a tied base from its embedding
        wrong = [name for name in wrong if name != "output.weight"]
    if arch == plan.family.arch and wrong and _VOCABULARY.issuperset(wrong) and _same_width(ours, theirs, wrong):
        rows = ours[wrong[0]][0]
        notes.append(
            f"the model has {rows} rows of tokens, the base's GGUF {theirs[wrong[0]][0]}: metadata and tokenizer come "
            "from the model's folder instead"
        )
        return None
    if arch != plan.family.arch or wrong:
        where = wrong[0] if wrong else "general.architecture"
        raise DeltaError(
            f"{like} is not a file of this model: {where} is {theirs.get(where, arch)}, here {ours.get(where)}",
            expected=f"the GGUF file of the base, architecture {plan.family.arch}, with the same tensors",
            hint="leave the base's GGUF out, so that the metadata comes from the folder",
        )
    return reader


def _same_width(ours: Mapping[str, Any], theirs: Mapping[str, Any], names: list[str]) -> bool:
    return all(name in ours and name in theirs and ours[name][1:] == theirs[name][1:] for name in names)


def _pre_of_donor(donor: Any, folder: Path, notes: list[str]) -> str | None:
    """The pre-tokenizer to write in place of the donor's; None to keep it."""
    definition = json_file(folder / "tokenizer.json")
    field = donor.fields.get(gguf.Keys.Tokenizer.PRE)
    if field is None or not definition:
        return None
    try:
        ours = pre_tokenizer(definition)
    except DeltaError:
        return None
    theirs = str(field.contents())
    if ours != theirs:
        notes.append(
            f"the base's GGUF names the pre-tokenizer {theirs!r}, the tokenizer.json that the adapter was trained with "
            f"splits text as {ours!r}; the file says {ours!r}"
        )
    return ours
