"""Cards by name, sizes as text, and what a process gets of a card."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.errors import ConfigError
from peftkit.planning.devices import DEVICES, find_device, parse_size, usable

GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("RTX 3060 12GB", "RTX 3060 12GB"),
        ("rtx3060 12 gb", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060 12GiB", "RTX 3060 12GB"),
        ("3060-8G", "RTX 3060 8GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("4070 Ti Super", "RTX 4070 Ti SUPER 16GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop 16GB"),
        ("RTX 4090 mobile", "RTX 4090 Laptop 16GB"),
        ("Tesla T4", "T4 16GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("NVIDIA RTX A6000", "RTX A6000 48GB"),
        ("a6000", "RTX A6000 48GB"),
        ("NVIDIA H200", "H200 141GB"),
    ],
)
def test_a_card_is_found_as_people_and_drivers_write_it(asked: str, name: str) -> None:
    assert find_device(asked).name == name


def test_every_card_is_found_by_its_own_name_and_names_are_unique() -> None:
    assert len({card.name for card in DEVICES}) == len(DEVICES) >= 70
    for card in DEVICES:
        assert find_device(card.name) is card
        assert find_device(f"NVIDIA GeForce {card.name.lower()}") is card


def test_a_name_without_memory_is_settled_by_what_the_driver_reports() -> None:
    reported = 12_622_168_064  # torch's total of a 12 GB RTX 3060: 11.76 GiB
    assert find_device("NVIDIA GeForce RTX 3060", reported).name == "RTX 3060 12GB"
    assert find_device("NVIDIA GeForce RTX 3060", 8 * GIB).name == "RTX 3060 8GB"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("RTX 3060", "more than one card; name it with its memory: RTX 3060 8GB, RTX 3060 12GB"),
        ("A100", "A100 40GB, A100 80GB"),
        ("RTX 3060 16GB", "there is no 'RTX 3060 16GB'; name it with its memory: RTX 3060 8GB, RTX 3060 12GB"),
        ("RTX 4080 Ti", "nearest: RTX 4070 Ti 12GB"),
        ("Radeon RX 7900 XTX", "not a card known here"),
        ("", "not a card known here"),
        ("12GB", "not a card known here"),
    ],
)
def test_a_name_that_is_no_card_or_several_is_an_error_with_names_to_choose_from(asked: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_device(asked)
    assert said in str(error.value)


def test_a_card_sold_with_12_gb_has_12_gib_unless_error_correction_keeps_some() -> None:
    assert find_device("RTX 3060 12GB").memory_bytes == 12 * GIB
    for card in DEVICES:
        sold = int(card.name.rsplit(" ", 1)[1].removesuffix("GB"))
        assert 0.93 <= card.memory_bytes / (sold * GIB) <= 1.0, card


# CUDA cores and boost clock in GHz, from NVIDIA's product pages: float32 is 2 FLOP per core and cycle.
CORES = {
    "RTX 2080 Ti 11GB": (4352, 1.545),
    "RTX 3060 12GB": (3584, 1.777),
    "RTX 3090 24GB": (10496, 1.695),
    "RTX 4070 Laptop 8GB": (4608, 2.175),
    "RTX 4090 24GB": (16384, 2.52),
    "RTX 5060 Ti 16GB": (4608, 2.572),
    "RTX 5090 32GB": (21760, 2.407),
    "T4 16GB": (2560, 1.59),
    "L4 24GB": (7424, 2.04),
    "L40S 48GB": (18176, 2.52),
    "RTX A6000 48GB": (10752, 1.8),
    "A100 80GB": (6912, 1.41),
}


@pytest.mark.parametrize("name", CORES)
def test_float32_rates_are_cores_times_clock(name: str) -> None:
    cores, clock = CORES[name]
    assert find_device(name).float32_tflops == pytest.approx(cores * clock * 2 / 1000, rel=0.01)


def test_consumer_cards_add_up_in_float32_at_twice_their_plain_rate_from_ampere_on_and_four_times_before() -> None:
    cards = [
        card for card in DEVICES if card.name.startswith("RTX ") and card.name[4].isdigit() and "Ada" not in card.name
    ]
    assert len(cards) >= 55
    for card in cards:
        share = 4 if card.capability < (8, 0) else 2
        assert card.tensor_tflops == pytest.approx(share * card.float32_tflops, rel=0.015), card


def test_bfloat16_is_slow_before_ampere() -> None:
    t4 = find_device("T4")
    assert t4.flops("float16") == 65e12
    assert t4.flops("bfloat16") == t4.flops("float32") == 8.1e12
    assert find_device("L4").flops("bfloat16") == 121e12


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 * GIB),
        ("11.5 GB", 11_500_000_000),
        ("12288MiB", 12 * GIB),
        ("  8gb ", 8 * 10**9),
        (".5 TiB", 2**39),
        ("4096 B", 4096),
        ("700kB", 700_000),
    ],
)
def test_sizes_are_decimal_with_gb_and_binary_with_gib(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["12", "", "GB", "0GB", "-3GB", "nanGB", "infGB", "12 GBs", "1e3GB", "12,5GB", "0.1 B", "0.0GiB", "١٢GB", "12Gb2"],
)
def test_anything_else_is_an_error_that_names_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"such as 12GB .*or 11\.5GiB"):
        parse_size(text)


@given(st.integers(1, 10**15), st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_whole_numbers_are_exact(count: int, unit: str) -> None:
    base = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]
    assert parse_size(f"{count}{unit}") == count * base


# GiB of a card, and "total capacity" in PyTorch's out-of-memory message under Linux (sources: `usable`); Windows
# reports all of it.
CAPACITY = [(6, 5.79), (6, 5.80), (8, 7.78), (10, 9.78), (12, 11.75), (24, 23.64), (24, 23.70), (32, 31.51)]


@pytest.mark.parametrize(("sold", "reported"), CAPACITY)
def test_a_process_gets_no_more_than_pytorch_reports_and_little_less(sold: int, reported: float) -> None:
    assert reported - 0.13 <= usable(sold * GIB) / GIB <= reported


def test_nothing_is_usable_of_next_to_nothing() -> None:
    assert usable(0) == usable(100 * 2**20) == 0
