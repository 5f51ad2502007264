"""The rules an untrusted adapter must keep, the limits among them, and the error that names the rule it broke."""

from __future__ import annotations

from typing import Any

from peftkit.errors import RegistryError

MOST_FILES = 1_000
"""Entries of the given folder: a training folder has dozens, and each one is listed in the answer."""

LARGEST_FILE = 8 << 30
"""Bytes of the weights: a copy of a 150k × 8k embedding and its head in float32 is 9.8 GB, in bfloat16 4.9 GB."""

LARGEST_CONFIG = 1 << 20
"""Bytes of adapter_config.json: the largest that PEFT writes names every module of a base, about 200 kB."""

LARGEST_HEADER = 10_000_000
"""Bytes of the safetensors header; 100 bytes a tensor, ten times less than the library would take."""

MOST_TENSORS = 100_000
"""Tensors: 1,000 layers × 10 modules × 10 tensors."""

LARGEST_RANK = 4096
"""A rank above it is no low-rank adapter of any base that fits on one GPU."""

LARGEST_SETTING = 1 << 20
"""Any other whole number of the configuration, seeds apart: PEFT allocates by them when it loads."""

LARGEST_SEED = (1 << 63) - 1
"""What torch takes as a seed."""

DEEPEST_CONFIG = 6
"""Levels of nesting in adapter_config.json: PEFT writes at most 3."""

LONGEST_NAME = 400
"""Characters of a module or tensor name."""

LONGEST_TEXT = 4096
"""Characters of any other text in the configuration."""

RULES: dict[str, str] = {
    "source.not-folder": "an adapter is a folder",
    "source.archive": "an adapter is a folder, not an archive of one",
    "source.link": "the folder itself is no link",
    "source.missing": "the folder holds adapter_config.json and adapter_model.safetensors, or tensors.safetensors",
    "source.special": "the files taken are plain files: no pipe, device, socket or folder",
    "name.link": "the files taken are no links",
    "name.look-alike": "no other file has a taken file's name but for case or Unicode form",
    "name.reserved": "no module is named by a word that PEFT or peftkit keeps for itself",
    "weights.pickle": "weights are safetensors: unpickling runs code",
    "weights.sharded": "weights are one file",
    "limit.files": f"the folder has at most {MOST_FILES} entries",
    "limit.bytes": f"the weights have at most {LARGEST_FILE} bytes",
    "limit.config-bytes": f"the configuration has at most {LARGEST_CONFIG} bytes",
    "limit.header-bytes": f"the header of the weights has at most {LARGEST_HEADER} bytes",
    "limit.tensors": f"there are at most {MOST_TENSORS} tensors",
    "limit.depth": f"the configuration is nested at most {DEEPEST_CONFIG} deep",
    "limit.rank": f"a rank is from 1 to {LARGEST_RANK}",
    "limit.setting": f"a whole number is from -1 to {LARGEST_SETTING}, a seed to {LARGEST_SEED}",
    "limit.name": f"a name has at most {LONGEST_NAME} characters, other text {LONGEST_TEXT}",
    "file.changed": "what was copied is what was checked",
    "config.json": "the configuration is one JSON object in UTF-8, with finite numbers",
    "config.duplicate-key": "no key of the configuration stands twice",
    "config.method": "peft_type names a method of the PEFT that the table was made from",
    "config.refused-method": "the method's adapters are whole in one folder and load the same everywhere",
    "config.unknown-key": "every key is one that PEFT knows for the method",
    "config.auto-map": "auto_map is absent: it names code to import",
    "config.megatron": "megatron_config is null and megatron_core is megatron.core: they name code to import",
    "config.type": "every value has the type that PEFT declares",
    "config.value": "every value lies in the range that PEFT accepts",
    "config.text": "text has no control characters and no lone surrogates",
    "config.name": "module names are dotted words of ASCII letters, digits, _ and -",
    "config.pattern": "module names are no regular expressions: PEFT would run them",
    "config.base-rewriting": "loading the adapter leaves the base's own weights and layers alone",
    "config.other-adapters": "the adapter needs no other adapter",
    "config.tokenizer": "no settings for a tokenizer: PEFT would load one with them",
    "config.path": "no path or model name that PEFT would load when it attaches the adapter",
    "config.not-in-file": "what PEFT can save of an adapter is in the file, not drawn or computed again",
    "header.short": "a safetensors file has at least 8 bytes",
    "header.length": "the header lies within the file",
    "header.json": "the header is one JSON object in UTF-8",
    "header.duplicate-key": "no tensor stands twice in the header",
    "header.metadata": "metadata is text",
    "header.entry": "every tensor has exactly dtype, shape and data_offsets, in whole numbers",
    "header.dtype": "every dtype is one that adapters have",
    "header.size": "a tensor has the bytes that its dtype and shape need",
    "header.range": "every tensor lies within the file",
    "header.overlap": "no two tensors share bytes",
    "header.hole": "no byte of the file lies outside every tensor",
    "tensor.none": "there is at least one tensor, and all that the method cannot do without",
    "tensor.name": "tensor names are dotted words of printable ASCII",
    "tensor.look-alike": "no two tensor names differ only in case",
    "tensor.unknown": "every tensor is one that the method saves with this configuration",
    "tensor.module": "every tensor belongs to a module that the configuration names",
    "tensor.pair": "tensors that work together are all there",
    "tensor.dtype": "learned tensors are floating point, indices are whole numbers",
    "tensor.empty": "no tensor has an extent of 0",
    "tensor.not-finite": "every number is finite",
    "shape.rank": "the tensors have the rank and sizes that the configuration says",
    "shape.base": "the tensors fit the base's",
    "shape.absent": "the base has every module that the tensors belong to",
    "shape.vocabulary": "the adapter does not resize the base's vocabulary",
}


_HINTS = {
    "header": "the file is damaged or made to mislead: fetch it or save it again",
    "tensor": "load it where it was trained and save it again",
    "shape": "give the base that it was trained on",
    "config": "where you trust the author, edit adapter_config.json in the given folder",
    "limit": "it is no adapter that peftkit can use",
    "name": "rename it in the given folder",
    "source": "give the folder that save_pretrained wrote",
    "file": "somebody else writes to this registry: find out who, then import again",
}


class AdapterRefused(RegistryError):
    """An untrusted adapter broke a rule; `rule` is its key in RULES."""

    def __init__(self, rule: str, fact: str, *, expected: str | None = None, hint: str | None = None) -> None:
        self.rule = rule
        super().__init__(fact, expected=expected or RULES[rule], hint=hint or _HINTS.get(rule.partition(".")[0]))

    def __str__(self) -> str:
        return f"{super().__str__()} (rule {self.rule})"


def shown(value: Any) -> str:
    """A stranger's value for a message: escaped, and cut to 80 characters."""
    text = ascii(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."
