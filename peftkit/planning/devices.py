"""Graphics cards by name, sizes as people write them, and what a process gets of a card's memory."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from peftkit.errors import ConfigError

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Device:
    """A card, by its vendor's public figures."""

    name: str
    memory_bytes: int
    """What the driver calls total: a card sold with 12 GB has 12 GiB, one with error correction somewhat less."""
    tensor_tflops: float
    """TFLOP/s of dense 16-bit tensor-core products that add up in float32, at the boost clock."""
    float32_tflops: float
    bandwidth_gb_s: float
    """10^9 bytes a second."""
    capability: tuple[int, int]
    """CUDA compute capability; from 8.0 on tensor cores multiply bfloat16."""

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_gb_s * 1e9

    def flops(self, compute_dtype: str) -> float:
        """FLOP/s of matrix products in a dtype; without tensor cores for it, those of float32."""
        tensor = compute_dtype == "float16" or (compute_dtype == "bfloat16" and self.capability >= (8, 0))
        return (self.tensor_tflops if tensor else self.float32_tflops) * 1e12


def _card(
    model: str,
    gigabytes: int,
    tensor: float,
    float32: float,
    bandwidth: float,
    capability: tuple[int, int],
    mebibytes: int | None = None,
) -> Device:
    memory = gigabytes * _GIB if mebibytes is None else mebibytes * _MIB
    return Device(f"{model} {gigabytes}GB", memory, tensor, float32, bandwidth, capability)


_TURING, _AMPERE, _ADA, _BLACKWELL = (7, 5), (8, 6), (8, 9), (12, 0)

# NVIDIA's architecture white papers (Turing, GA102, Ada, Blackwell RTX), data sheets and product pages; laptop cards at
# the highest boost clock NVIDIA lists, which few laptops hold. GeForce cards add up in float32 at half the tensor rate
# they are advertised with. Mebibytes are nvidia-smi's, where error correction or the vendor keeps some of the memory.
DEVICES: tuple[Device, ...] = (
    _card("RTX 2060", 6, 25.8, 6.5, 336, _TURING),
    _card("RTX 2060", 12, 28.7, 7.2, 336, _TURING),
    _card("RTX 2060 SUPER", 8, 28.7, 7.2, 448, _TURING),
    _card("RTX 2070", 8, 29.9, 7.5, 448, _TURING),
    _card("RTX 2070 SUPER", 8, 36.3, 9.1, 448, _TURING),
    _card("RTX 2080", 8, 40.3, 10.1, 448, _TURING),
    _card("RTX 2080 SUPER", 8, 44.6, 11.2, 496, _TURING),
    _card("RTX 2080 Ti", 11, 53.8, 13.4, 616, _TURING),
    _card("TITAN RTX", 24, 130.5, 16.3, 672, _TURING),
    _card("RTX 3050", 6, 13.5, 6.8, 168, _AMPERE),
    _card("RTX 3050", 8, 18.2, 9.1, 224, _AMPERE),
    _card("RTX 3050 Laptop", 4, 14.3, 7.1, 192, _AMPERE),
    _card("RTX 3050 Laptop", 6, 15.3, 7.6, 168, _AMPERE),
    _card("RTX 3050 Ti Laptop", 4, 17.4, 8.7, 192, _AMPERE),
    _card("RTX 3060", 8, 25.5, 12.7, 240, _AMPERE),
    _card("RTX 3060", 12, 25.5, 12.7, 360, _AMPERE),
    _card("RTX 3060 Laptop", 6, 26.2, 13.1, 336, _AMPERE),
    _card("RTX 3060 Ti", 8, 32.4, 16.2, 448, _AMPERE),
    _card("RTX 3070", 8, 40.6, 20.3, 448, _AMPERE),
    _card("RTX 3070 Laptop", 8, 33.2, 16.6, 448, _AMPERE),
    _card("RTX 3070 Ti", 8, 43.5, 21.7, 608, _AMPERE),
    _card("RTX 3070 Ti Laptop", 8, 35.0, 17.5, 448, _AMPERE),
    _card("RTX 3080", 10, 59.5, 29.8, 760, _AMPERE),
    _card("RTX 3080", 12, 61.3, 30.6, 912, _AMPERE),
    _card("RTX 3080 Laptop", 8, 42.0, 21.0, 448, _AMPERE),
    _card("RTX 3080 Laptop", 16, 42.0, 21.0, 448, _AMPERE),
    _card("RTX 3080 Ti", 12, 68.2, 34.1, 912, _AMPERE),
    _card("RTX 3080 Ti Laptop", 16, 47.2, 23.6, 512, _AMPERE),
    _card("RTX 3090", 24, 71.2, 35.6, 936, _AMPERE),
    _card("RTX 3090 Ti", 24, 80.0, 40.0, 1008, _AMPERE),
    _card("RTX 4050 Laptop", 6, 24.3, 12.1, 192, _ADA),
    _card("RTX 4060", 8, 30.2, 15.1, 272, _ADA),
    _card("RTX 4060 Laptop", 8, 29.1, 14.6, 256, _ADA),
    _card("RTX 4060 Ti", 8, 44.1, 22.1, 288, _ADA),
    _card("RTX 4060 Ti", 16, 44.1, 22.1, 288, _ADA),
    _card("RTX 4070", 12, 58.3, 29.1, 504, _ADA),
    _card("RTX 4070 Laptop", 8, 40.1, 20.0, 256, _ADA),
    _card("RTX 4070 SUPER", 12, 71.0, 35.5, 504, _ADA),
    _card("RTX 4070 Ti", 12, 80.2, 40.1, 504, _ADA),
    _card("RTX 4070 Ti SUPER", 16, 88.2, 44.1, 672, _ADA),
    _card("RTX 4080", 16, 97.5, 48.7, 717, _ADA),
    _card("RTX 4080 Laptop", 12, 67.7, 33.9, 432, _ADA),
    _card("RTX 4080 SUPER", 16, 104.4, 52.2, 736, _ADA),
    _card("RTX 4090", 24, 165.2, 82.6, 1008, _ADA),
    _card("RTX 4090 Laptop", 16, 79.4, 39.7, 576, _ADA),
    _card("RTX 5050", 8, 26.3, 13.2, 320, _BLACKWELL),
    _card("RTX 5060", 8, 38.4, 19.2, 448, _BLACKWELL),
    _card("RTX 5060 Laptop", 8, 33.2, 16.6, 384, _BLACKWELL),
    _card("RTX 5060 Ti", 8, 47.4, 23.7, 448, _BLACKWELL),
    _card("RTX 5060 Ti", 16, 47.4, 23.7, 448, _BLACKWELL),
    _card("RTX 5070", 12, 61.7, 30.9, 672, _BLACKWELL),
    _card("RTX 5070 Laptop", 8, 43.3, 21.6, 384, _BLACKWELL),
    _card("RTX 5070 Ti", 16, 87.9, 43.9, 896, _BLACKWELL),
    _card("RTX 5070 Ti Laptop", 12, 52.3, 26.1, 672, _BLACKWELL),
    _card("RTX 5080", 16, 112.6, 56.3, 960, _BLACKWELL),
    _card("RTX 5080 Laptop", 16, 70.3, 35.1, 896, _BLACKWELL),
    _card("RTX 5090", 32, 209.5, 104.8, 1792, _BLACKWELL, 32607),
    _card("RTX 5090 Laptop", 24, 90.7, 45.3, 896, _BLACKWELL),
    _card("RTX A4000", 16, 76.7, 19.2, 448, _AMPERE),
    _card("RTX A5000", 24, 111.1, 27.8, 768, _AMPERE),
    _card("RTX A6000", 48, 154.8, 38.7, 768, _AMPERE),
    _card("RTX 6000 Ada", 48, 364.2, 91.1, 960, _ADA, 46068),
    _card("T4", 16, 65.0, 8.1, 320, _TURING, 15360),
    _card("V100", 16, 112.0, 14.0, 900, (7, 0), 16160),
    _card("V100", 32, 112.0, 14.0, 900, (7, 0), 32510),
    _card("A10", 24, 125.0, 31.2, 600, _AMPERE, 23028),
    _card("A10G", 24, 70.0, 35.0, 600, _AMPERE, 23028),
    _card("L4", 24, 121.0, 30.3, 300, _ADA, 23034),
    _card("L40S", 48, 362.0, 91.6, 864, _ADA, 46068),
    _card("A100", 40, 312.0, 19.5, 1555, (8, 0)),
    _card("A100", 80, 312.0, 19.5, 1935, (8, 0)),
    _card("H100 PCIe", 80, 756.0, 51.0, 2000, (9, 0), 81559),
    _card("H100", 80, 989.0, 67.0, 3350, (9, 0), 81559),
    _card("H200", 141, 989.0, 67.0, 4800, (9, 0), 143771),
)

_SIZE = re.compile(r"\s*(-?[0-9]*\.?[0-9]+)\s*(B|[KMGT]I?B)\s*", re.IGNORECASE)
_FORM = "a number above 0 with its unit, such as 12GB (12 * 10^9 bytes) or 11.5GiB (11.5 * 2^30 bytes)"
_POWERS = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4}

_MEMORY = re.compile(r"(?<![0-9A-Za-z.])([0-9]+)\s*G(?:I?B)?\b", re.IGNORECASE)
_NOISE = re.compile(r"\b(nvidia|geforce|tesla|gpu|generation|hbm\w*|sxm\w*|with max-?q design)\b")


def find_device(name: str, memory_bytes: int | None = None) -> Device:
    """The card of that name, as a person or a driver writes it: `RTX 3060 12GB`, `NVIDIA A100-SXM4-40GB`.

    A driver's name of a consumer card lacks the memory; `memory_bytes` is then what it reports.
    Raises ConfigError when no card, or more than one, has this name.
    """
    asked = _MEMORY.search(name)
    key = _key(_MEMORY.sub(" ", name))
    same = [card for card in DEVICES if _key(_model(card)) == key]
    same = same or [card for card in DEVICES if _key(_model(card)) == key.removesuffix("pcie")]
    found = [card for card in same if asked is None or _gigabytes(card) == int(asked[1])]
    if len(found) > 1 and memory_bytes is not None:
        found = [min(found, key=lambda card: abs(card.memory_bytes - memory_bytes))]
    if len(found) == 1:
        return found[0]
    if same:
        fact = f"{name!r} is more than one card" if found else f"there is no {name!r}"
        raise ConfigError([f"gpu: {fact}; name it with its memory: {_names(same)}"])
    raise ConfigError([f"gpu: {name!r} is not a card known here; {_suggestion(name, key)}"], hint="say --budget 12GB")


def parse_size(text: str) -> int:
    """Bytes of a size such as `12GB` (10^9) or `11.5 GiB` (2^30). Raises ConfigError for anything else."""
    match = _SIZE.fullmatch(text)
    number = Decimal(match[1]) if match else Decimal(0)
    if match is None or number <= 0:
        raise ConfigError([f"{text!r} is not a size: expected {_FORM}"])
    unit = match[2].upper()
    size = int(number * (1024 if "I" in unit else 1000) ** _POWERS[unit[0]])
    if size < 1:
        raise ConfigError([f"{text!r} is less than a byte: expected {_FORM}"])
    return size


def usable(memory_bytes: int) -> int:
    """What the driver leaves of a card to one process that has it to itself, its CUDA context still included.

    PyTorch reports 5.79 of 6 GiB on an RTX 2060 (facebookresearch/meshrcnn#92), 7.78 of 8 on a 3070
    (akshitac8/OW-DETR#46), 9.78 of 10 on a 3080 (zai-org/CogVideo#34), 11.75 of 12 on a 3060
    (Kunhao-Liu/StyleGaussian#12), 23.64 of 24 on a 4090 (3DTopia/Phidias-Diffusion#8): 0.22 to 0.36 GiB less, more on
    larger cards. A display takes more, often 0.3 to 1 GiB: give a budget for a card that drives one. The memory plan
    counts the context as a part of its own.
    """
    return max(0, int(memory_bytes * (1 - 0.011)) - 160 * _MIB)


def _model(card: Device) -> str:
    return card.name.rsplit(" ", 1)[0]


def _gigabytes(card: Device) -> int:
    return int(card.name.rsplit(" ", 1)[1].removesuffix("GB"))


def _key(name: str) -> str:
    """A name without vendor words, spaces, dashes and the leading `rtx`, in small letters."""
    words = _NOISE.sub(" ", name.lower().replace("mobile", "laptop").replace("-", " "))
    return re.sub(r"[^a-z0-9]", "", words).removeprefix("rtx")


def _names(cards: Iterable[Device]) -> str:
    return ", ".join(card.name for card in cards)


def _suggestion(name: str, key: str) -> str:
    models = {_key(_model(card)): card for card in DEVICES}
    near = difflib.get_close_matches(key, models, n=3, cutoff=0.5)
    return f"nearest: {_names(models[match] for match in near)}" if near else f"known: {_names(DEVICES)}"
