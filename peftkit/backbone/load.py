"""Load a base into memory as a backbone: quantized as asked, contained, identified."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peftkit.backbone.contain import contain_bitsandbytes, quantized_linears
from peftkit.backbone.converted import shapes_only, skipped
from peftkit.backbone.decide import Placement, device_of, label, place
from peftkit.backbone.heads import check_absent, head_modules, linear_names, model_class, renamed, settings_of
from peftkit.backbone.locate import locate
from peftkit.backbone.measured import block_of, measure
from peftkit.backbone.quiet import quiet
from peftkit.backbone.spec import QuantSpec
from peftkit.backbone.threads import settle_threads
from peftkit.backbone.upload import agree_with_upload
from peftkit.base.head import Head
from peftkit.base.identity import BaseIdentity, identify, weight_files
from peftkit.base.places import remember_place
from peftkit.base.ref import BaseSpec, LocatedBase, read_config
from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.errors import BackboneError
from peftkit.events import Decision, Report, silent
from peftkit.process_group import launched


@dataclass(frozen=True)
class Backbone:
    """A base in memory, with its tokenizer and identity."""

    model: Any
    """The `PreTrainedModel`; all its parameters are frozen."""
    tokenizer: Tokenizer
    base: LocatedBase
    identity: BaseIdentity
    quant: QuantSpec
    placement: Placement
    head: Head | None = None
    """The task's head that stands on it; None is the language head."""

    @property
    def label(self) -> str:
        """What the weights are held in: `nf4+dq`, `int8`, or the dtype where nothing is quantized."""
        return label(self.quant, self.placement)

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        return self.placement.device

    def quantization_record(self) -> dict[str, Any]:
        """What an adapter's manifest says about the weights that it was trained on."""
        dtype = str(self.placement.compute_dtype).removeprefix("torch.")
        record: dict[str, Any] = {"bits": self.quant.bits, "compute_dtype": dtype, "label": self.label}
        if self.quant.bits == 4:
            record |= {"quant_type": self.quant.quant_type, "double_quant": self.quant.double_quant}
        return record


Dense = Callable[[Any], Collection[str]]
"""A model without numbers → names of its linear layers that are not quantized."""


def load_backbone(
    base: BaseSpec,
    quant: QuantSpec,
    cache: Path,
    *,
    head: Head | None = None,
    seed: int = 0,
    dense: Dense | None = None,
    report: Report = silent,
    located: LocatedBase | None = None,
) -> Backbone:
    """Load `base` in the precision of `quant`; nothing downloaded is ever executed.

    With a `head`, that of a task takes the place of the language head; what the base's files lack of it is drawn from
    `seed`. The layers that `dense` names keep the numbers of the base's files, in 16 or 32 bits. Raises BaseError when
    the base cannot be found, BackboneError when it cannot be loaded this way.
    """
    _refuse_sharded_int8(quant)
    located = located or locate(base, cache, report)
    config = read_config(located.folder)
    quant = agree_with_upload(quant, config, located.source)
    _refuse_remote_code(config, located.source)
    settings_of(head, str(config.get("model_type")))  # a base without such a head is refused before all else
    weight_files(located.folder)
    if device_of(quant)[0].type == "cpu":
        report(settle_threads())  # before anything is timed or computed with them
    placement = place(quant, fused=_takes_sdpa(config, head), timing=lambda: measure(block_of(config)))
    if quant.compute_dtype == "measured":  # from here on it is what was found
        quant = quant.model_copy(update={"compute_dtype": _plain(placement.compute_dtype)})
    for decision in placement.decisions:
        report(decision)
    identity = identify(located.folder, cache)
    remember_place(identity, located.place, cache)
    tokenizer = tokenizer_for(head, located.folder)
    kept = _kept(config, quant, dense, head)
    if kept:
        why = "they are trained; the others stay packed"
        report(Decision("unquantized", f"{len(kept)} linear layers in {_plain(placement.dtype)}", why))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_pretrained(located.folder, config, quant, placement, kept, head)
    model.requires_grad_(False)
    model.eval()
    contain_bitsandbytes(model)
    for layer in quantized_linears(model).values():
        if hasattr(layer, "compute_dtype"):  # 4-bit uploads bring their own; what is printed here must hold
            layer.compute_dtype, layer.compute_type_is_set = placement.compute_dtype, True
            if layer.bias is not None:  # upstream converts it in the first forward: the base would change
                layer.bias.data = layer.bias.data.to(placement.compute_dtype)
    if head is None or head.kind == "seq2seq":
        # A base's own sampling defaults (repetition penalty, temperature) would bend every answer, greedy ones too.
        start = getattr(model.config, "decoder_start_token_id", None)
        model.generation_config = GenerationConfig(
            eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id, decoder_start_token_id=start
        )
    elif head.kind == "sequence":  # a causal base is scored at the last token that is not this one
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_id
    if new := head_modules(model):
        report(Decision("head", ", ".join(new), f"{_told(head)}; it is trained in float32"))
    return Backbone(model, tokenizer, located, identity, quant, placement, head)


def tokenizer_for(head: Head | None, folder: Path) -> Tokenizer:
    """The tokenizer of a base's folder; one that need not end answers for a head that gives none."""
    if head is not None and head.kind == "image":
        return Tokenizer(None, (), 0)
    return load_tokenizer(folder, answers=head is None or head.kind == "seq2seq")


def _told(head: Head | None) -> str:
    if head is None or not head.labels:
        return "the task's own"
    if head.problem == "regression":
        return f"one number, {head.labels[0]!r}"
    shown = ", ".join(head.labels[:4]) + (", …" if len(head.labels) > 4 else "")
    return f"{len(head.labels)} labels: {shown}"


def _kept(config: dict[str, Any], quant: QuantSpec, dense: Dense | None, head: Head | None) -> list[str]:
    """Names of the linear layers that bitsandbytes leaves alone on request; an upload's own quantization stays."""
    if (dense is None and head is None) or quant.bits not in (4, 8) or config.get("quantization_config"):
        return []
    model = shapes_only(config, head)
    return sorted({*(dense(model) if dense is not None else ()), *linear_names(model)})


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _from_pretrained(
    folder: Path,
    config: dict[str, Any],
    quant: QuantSpec,
    placement: Placement,
    kept: Sequence[str],
    head: Head | None,
) -> Any:
    options: dict[str, Any] = settings_of(head, str(config["model_type"])) | {
        "dtype": placement.dtype,
        # With FSDP no device needs to hold it whole: `backbone.shard` moves it layer by layer.
        "device_map": {"": torch.device("cpu") if launched().sharded else placement.device},
        "attn_implementation": placement.attention,
        "trust_remote_code": False,
        "use_safetensors": True,
        "local_files_only": True,
    }
    if quant.bits in (4, 8) and not config.get("quantization_config"):
        patterns = skipped(shapes_only(config, head), kept) if kept else None
        options["quantization_config"] = _bitsandbytes_config(quant, placement, patterns)
    if head is not None:
        options["ignore_mismatched_sizes"] = True  # a base that was trained for another task has another head
        options["key_mapping"] = renamed(head, str(config["model_type"])) or None
    try:
        with quiet():
            model, info = model_class(head).from_pretrained(str(folder), output_loading_info=True, **options)
    except torch.cuda.OutOfMemoryError as error:
        raise BackboneError(
            f"{folder.name} in {quant.label} does not fit into the GPU's memory",
            hint="set quant.bits=4, or choose a smaller base",
        ) from error
    except Exception as error:  # a hostile or broken config.json makes transformers raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(f"{folder} cannot be loaded in {quant.label}: {reason}") from error
    check_absent({*info["missing_keys"], *(each[0] for each in info["mismatched_keys"])}, model, str(folder))
    if head is not None and head.kind != "seq2seq":
        # A decoder would keep every layer's keys and values for tokens that never come.
        model.config.get_text_config().use_cache = model.config.use_cache = False
    return model


def _bitsandbytes_config(quant: QuantSpec, placement: Placement, patterns: list[str] | None) -> BitsAndBytesConfig:
    if quant.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=patterns)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=patterns,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=placement.compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _takes_sdpa(config: dict[str, Any], head: Head | None) -> bool:
    """Whether transformers has torch's fused attention for this architecture (not for Gemma-2, which caps scores)."""
    kind = model_class(head)._model_mapping.get(CONFIG_MAPPING[str(config["model_type"])], None)
    return bool(getattr(kind, "_supports_sdpa", True))


def _refuse_sharded_int8(quant: QuantSpec) -> None:
    if quant.bits == 8 and launched().sharded:
        raise BackboneError(
            "int8 under FSDP: bitsandbytes keeps codes and scales outside the parameter, and FSDP would lose them",
            expected="quant.bits=4, 16 or 32 under FSDP",
            hint="set quant.bits=4, or start it with DDP: accelerate launch --multi_gpu",
        )


def _refuse_remote_code(config: dict[str, Any], source: str) -> None:
    kind = str(config.get("model_type", "none"))
    if kind not in CONFIG_MAPPING:
        needs = " and brings its own code, which peftkit never runs" if config.get("auto_map") else ""
        raise BackboneError(
            f"{source} has the model type {kind!r}, which this transformers does not know{needs}",
            expected="an architecture that is part of transformers",
            hint="pip install --upgrade transformers",
        )
