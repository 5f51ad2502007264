"""The ways to train, one row each: what is trained, with which settings, at which learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peftkit.config import Spec
from peftkit.errors import TuningError

Kind = Literal["peft", "tensors"]
MethodName = Literal[
    "lora", "rslora", "dora", "lora_plus", "pissa", "loftq", "eva", "adalora", "ia3", "vera", "loha", "lokr", "oft",
    "prompt_tuning", "prefix_tuning", "trainable_tokens", "full", "top_layers", "bias_only", "norms", "patterns",
]  # fmt: skip


class AdapterSpec(Spec):
    """What is trained. A setting that is left out is the method's own; one that the method does not have is refused."""

    selector: ClassVar[str] = "method"

    method: MethodName = "lora"
    """An adapter of PEFT (lora to trainable_tokens), or tensors of the base itself (full to patterns)."""
    r: int | None = Field(default=None, ge=1, le=1024)
    """Rank of the update."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scaling: lora_alpha / r, or lora_alpha / sqrt(r) with rslora."""
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear", "auto"] | list[str] | None = None
    """all-linear (every linear layer but the head), or a list of module name endings; auto is ia3's own choice: keys,
    values and the last layer of every MLP."""
    feedforward_modules: list[str] | None = None
    """ia3: those of target_modules whose input is scaled, not their output."""
    layers: str | None = None
    """Blocks that are touched: all, top:8, bottom:4, or indices and ranges such as 0,2,8-15. With norms and bias_only,
    `all` takes in what stands outside of the blocks too, such as the final norm; naming every block does not."""
    lora_plus_ratio: float | None = Field(default=None, gt=0)
    """lora_plus: how many times the learning rate lora_B gets."""
    init_r: int | None = Field(default=None, ge=1, le=1024)
    """adalora: rank at the beginning, from which it falls to r on the average."""
    orth_reg_weight: float | None = Field(default=None, ge=0)
    """adalora: weight of the penalty that keeps the two factors orthogonal."""
    oft_block_size: int | None = Field(default=None, ge=2)
    """oft: rows that one rotation turns together."""
    decompose_factor: int | None = Field(default=None, ge=-1)
    """lokr: size of the small Kronecker factor; -1 makes both as square as possible."""
    num_virtual_tokens: int | None = Field(default=None, ge=1, le=1024)
    """prompt_tuning, prefix_tuning: tokens that are put before every input."""
    tokens: list[str | int] | None = None
    """Tokens of the vocabulary, as text or as ids, whose embeddings are trained; of lora & co., beside the layers."""
    top_layers: int | None = Field(default=None, ge=0)
    """top_layers: how many of the last blocks are trained."""
    train_head: bool | None = None
    """top_layers: whether the final norm and the head are trained too; a tied head is parted from the embeddings."""
    patterns: list[str] | None = None
    """patterns: names of the base's tensors, with the wildcards * and ?."""
    seed: int = 0
    """Seed of the initial numbers."""

    @model_validator(mode="after")
    def _as_the_method_has_it(self) -> Self:
        fields = METHODS[self.method].fields
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in ("method", "seed"):
                continue
            if value is not None and name not in fields:
                takes = ", ".join(fields) or "no settings"
                raise ValueError(f"{self.method} has no {name} (given: {value!r}); it takes {takes}")
            if value is None and name in fields:
                if fields[name] is None:
                    raise ValueError(f"{self.method} needs {name}")
                self.__dict__[name] = copy(fields[name])  # not among the fields that somebody set
        if problem := _contradiction(self):
            raise ValueError(problem)
        return self

    def record(self) -> dict[str, Any]:
        """The method and its settings, without those that it does not have."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


def _contradiction(spec: AdapterSpec) -> str | None:
    """What cannot be meant in a spec whose settings all belong to its method."""
    if spec.method == "adalora" and (spec.init_r or 0) <= (spec.r or 0):
        return f"adalora lowers the rank from init_r to r, and init_r={spec.init_r} is not above r={spec.r}"
    if spec.target_modules == "auto" and spec.method != "ia3":
        return f"target_modules=auto is ia3's; {spec.method} takes all-linear or a list of module name endings"
    if spec.feedforward_modules and spec.target_modules == "auto":
        return "ia3 chooses feedforward_modules together with target_modules=auto; set both or neither"
    if spec.method == "trainable_tokens" and not spec.tokens:
        return "trainable_tokens needs at least one token"
    return None


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    kind: Kind
    """`peft`: layers beside the base's; `tensors`: tensors of the base itself."""
    fields: Mapping[str, Any]
    """The settings that it takes, with its own values; None where there is no such value."""
    learning_rate: float
    """Peak rate, where the run gives none: the lowest that was not measurably worse than the best, on the embedded base
    (benchmarks/methods_sweep.py; bias_only: BitFit's). A larger base, or a longer run, may ask for less."""
    source: str
    bits: tuple[int, ...] = (4, 8, 16, 32)
    """Bits of the bases that it trains over."""
    why_not: str = ""
    """Why it does not train over the others."""


_PLACES = {"target_modules": "all-linear", "layers": "all"}
_LORA = {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, **_PLACES}
_WITH_TOKENS = {**_LORA, "tokens": []}
_ADALORA = {**_LORA, "init_r": 24, "orth_reg_weight": 0.5}  # the weight is PEFT's
_FACTORS = {"r": 16, "lora_alpha": 32.0, **_PLACES}
_NOT_PACKED = "PEFT takes the shape of the packed weight for that of the layer"

METHODS: dict[MethodName, Method] = {
    "lora": Method("peft", _WITH_TOKENS, 1e-3, "Hu et al. 2021, arXiv 2106.09685"),
    "rslora": Method("peft", _WITH_TOKENS, 1e-4, "Kalajdzievski 2023, arXiv 2312.03732"),
    "dora": Method("peft", _WITH_TOKENS, 3e-4, "Liu et al. 2024, arXiv 2402.09353"),
    "lora_plus": Method("peft", {**_WITH_TOKENS, "lora_plus_ratio": 4.0}, 1e-4, "Hayou et al. 2024, arXiv 2402.12354"),
    "pissa": Method("peft", _LORA, 1e-4, "Meng et al. 2024, arXiv 2404.02948"),
    "loftq": Method(
        "peft",
        _LORA,
        3e-4,
        "Li et al. 2023, arXiv 2310.08659",
        (4, 8),
        "it repairs the error of quantization, and these weights are not quantized",
    ),
    "eva": Method("peft", _LORA, 1e-4, "Paischer et al. 2024, arXiv 2410.07170"),
    "adalora": Method("peft", _ADALORA, 1e-2, "Zhang et al. 2023, arXiv 2303.10512"),
    "ia3": Method(
        "peft",
        {"target_modules": "auto", "feedforward_modules": [], "layers": "all"},
        1e-2,
        "Liu et al. 2022, arXiv 2205.05638",
    ),
    "vera": Method("peft", {"r": 256, **_PLACES}, 3e-2, "Kopiczko 2023, arXiv 2310.11454"),
    "loha": Method(
        "peft", _FACTORS, 3e-3, "FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS", (8, 16, 32), _NOT_PACKED
    ),
    "lokr": Method(
        "peft",
        {**_FACTORS, "decompose_factor": -1},
        3e-3,
        "LyCORIS, Yeh et al. 2023, arXiv 2309.14859",
        (8, 16, 32),
        _NOT_PACKED,
    ),
    "oft": Method("peft", {"oft_block_size": 32, **_PLACES}, 1e-4, "Qiu et al. 2023, arXiv 2306.07280"),
    "prompt_tuning": Method("peft", {"num_virtual_tokens": 20}, 3e-2, "Lester et al. 2021, arXiv 2104.08691"),
    "prefix_tuning": Method("peft", {"num_virtual_tokens": 20}, 1e-2, "Li and Liang 2021, arXiv 2101.00190"),
    "trainable_tokens": Method("peft", {"tokens": None}, 3e-3, "PEFT, tuners/trainable_tokens"),
    "full": Method(
        "tensors", {}, 3e-5, "every tensor of the base", (16, 32), "it trains every tensor: none would stay packed"
    ),
    "top_layers": Method("tensors", {"top_layers": 2, "train_head": True}, 3e-4, "Howard and Ruder 2018, 1801.06146"),
    "bias_only": Method("tensors", {"layers": "all"}, 1e-3, "BitFit, Ben Zaken et al. 2021, arXiv 2106.10199"),
    "norms": Method("tensors", {"layers": "all"}, 1e-3, "Zhao et al. 2023, arXiv 2312.11420"),
    "patterns": Method("tensors", {"patterns": None}, 3e-4, "tensors by name"),
}


def check_over(spec: AdapterSpec, bits: int) -> None:
    """Raise TuningError when a method does not train over a base of so many bits."""
    method = METHODS[spec.method]
    if bits not in method.bits:
        fine = " or ".join(map(str, method.bits))
        raise TuningError(
            f"adapter.method={spec.method} does not go with quant.bits={bits}: {method.why_not}",
            expected=f"a base of {fine} bits, or another method",
            hint=f"quant.bits={max(b for b in method.bits if b <= 16)}, or adapter.method=lora",
        )
