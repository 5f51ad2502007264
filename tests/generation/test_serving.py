"""Engine and fleet together beside PEFT: whoever else is answered, evicted or published, a version's answers are its
own."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_lab import ATTENTION, LINEAR, peft_model
from generation.adapters_lab import Lab, bytes_of, make_lab
from generation.engine_lab import ask, ids, numbers, read_by
from generation.serving_lab import Oracle, check_seats
from tuning.method_zoo import save_method, save_tensors

from peftkit.errors import EngineBusy
from peftkit.generation.engine import Engine
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.limits import Limits
from peftkit.generation.opening import engine_over
from peftkit.generation.running import Ticket
from peftkit.registry.store import Version
from peftkit.tuning.skeleton import skeleton

NEW = 8
ADAPTERS: list[dict[str, Any]] = [
    {"r": 1},
    {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "target_modules": ATTENTION},
    {"r": 4, "use_rslora": True},
    {"r": 5, "target_modules": "all-linear"},
    {"r": 8, "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 16}},
    {"r": 8, "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.o_proj": 40}},
    {"r": 4, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"v_proj": 9, "up_proj": 1}, "use_rslora": True},
    {"r": 16},
    {"r": 16, "lora_alpha": 8, "target_modules": ["v_proj", "down_proj"]},
    {"r": 32, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {"r": 6, "layers_to_transform": [1]},
    {"r": 8, "target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [0]},
    {"r": 2, "lora_alpha": 5, "target_modules": ["o_proj"]},
    {"r": 12, "target_modules": LINEAR, "exclude_modules": ["k_proj"]},
    {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
]
PREFIX = numbers(24, 99)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("serving"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def oracle(lab: Lab) -> Oracle:
    return Oracle(lab)


@pytest.fixture(scope="module")
def held(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    """Sixteen that a bank holds, registered."""
    folder, found = tmp_path_factory.mktemp("held"), {}
    for i, settings in enumerate(ADAPTERS):
        peft_model(lab.backbone().model, 200 + i, **settings).save_pretrained(folder / f"m{i}")
        (folder / f"m{i}" / "README.md").unlink()
        found[f"m{i}"] = lab.publish(f"m{i}", folder / f"m{i}")
    return found


@pytest.fixture(scope="module")
def own(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    """Five that no bank holds, registered."""
    bare, folder = lab.backbone().model, tmp_path_factory.mktemp("own")
    dora = save_method(skeleton(bare), "LORA", folder / "dora", use_dora=True)
    methods = {"ia3": "IA3", "prompts": "PROMPT_TUNING", "prefixes": "PREFIX_TUNING"}
    saved = {name: save_method(skeleton(bare), method, folder / name) for name, method in methods.items()}
    norm = save_tensors(folder / "norm", {"model.norm.weight": torch.linspace(-2, 2, 64)})
    found = {name: lab.publish(name, saved[name]) for name in saved}
    return found | {"dora": lab.publish("dora", dora), "norm": lab.publish("norm", norm, "tensors")}


Serve = Callable[..., tuple[Engine, Fleet]]


@pytest.fixture
def serve(lab: Lab) -> Iterator[Serve]:
    """Engines over fleets; whatever a test did, every seat was given back."""
    made: list[Fleet] = []

    def make(resolve: Callable[[str], Version] = lab.registry.resolve, **settings: Any) -> tuple[Engine, Fleet]:
        mine = {key: settings.pop(key) for key in ("slots", "memory", "host_memory") if key in settings}
        made.append(Fleet(settings.pop("backbone", lab.backbone()), resolve, **mine))
        return engine_over(made[-1], Limits(**settings)), made[-1]

    yield make
    for fleet in made:
        fleet.close()
        assert fleet.bank.bytes == 0


def prompt_of(i: int) -> list[int]:
    """Of 1 to 70 tokens; every third begins alike."""
    return (PREFIX if i % 3 == 0 else []) + numbers(1 + 7 * i % 46, i)


# ---- every adapter as alone


def test_sixteen_adapters_and_the_base_in_one_batch_answer_as_alone(
    oracle: Oracle, held: dict[str, Version], serve: Serve
) -> None:
    engine, fleet = serve(slots=16, rows=17)
    asked = {name: ask(engine, prompt_of(i), NEW, adapter=name, logprobs=3) for i, name in enumerate([None, *held])}
    engine.step()
    assert engine.running == 17
    assert engine.passes == 1
    check_seats(engine, fleet)
    engine.run()
    assert engine.passes == NEW, "one pass reads all prompts, and each further token is one pass for all"
    assert len(fleet.statistics().resident) == 16
    for name, ticket in asked.items():
        oracle.check(ticket, held.get(str(name)))


@pytest.mark.parametrize(("rows", "others"), [(17, False), (5, True), (17, True)])
def test_four_slots_serve_them_all_whoever_makes_room(
    rows: int, others: bool, oracle: Oracle, held: dict[str, Version], own: dict[str, Version], serve: Serve
) -> None:
    """Each asks twice, in some order, so that it is evicted in between; also beside those that no bank holds."""
    versions: dict[str | None, Version | None] = dict.fromkeys([None])
    versions.update(held)
    versions.update(own if others else {})
    wishes = [(name, prompt_of(50 * turn + i)) for turn in range(2) for i, name in enumerate(versions)]
    random.Random(1).shuffle(wishes)
    engine, fleet = serve(slots=4, rows=rows, prompt_tokens=100)
    tickets = [ask(engine, prompt, NEW, adapter=name, logprobs=1) for name, prompt in wishes]
    busiest = 0
    while engine.step():
        check_seats(engine, fleet)
        busiest = max(busiest, engine.running)
    assert busiest > 3
    assert fleet.statistics().evictions > 16
    for ticket, (name, _) in zip(tickets, wishes, strict=True):
        oracle.check(ticket, versions[name])


def test_these_answers_can_be_told_apart(oracle: Oracle, held: dict[str, Version], own: dict[str, Version]) -> None:
    answers = {name: oracle.ids(version, PREFIX, NEW) for name, version in {**held, **own, "base": None}.items()}
    assert len(set(map(tuple, answers.values()))) == len(answers)


# ---- names that mean something else after a while


def told_apart(oracle: Oracle, versions: list[Version | None], prompts: list[list[int]], new: int) -> None:
    for prompt in prompts:
        assert len({tuple(oracle.ids(version, prompt, new)) for version in versions}) == len(versions)


@pytest.mark.parametrize("seed", range(2))
def test_names_that_are_published_again_and_aliases_that_move_under_load(
    seed: int, lab: Lab, oracle: Oracle, serve: Serve
) -> None:
    draw, names = random.Random(seed), ("first", "second")
    payloads = {name: [lab.payload(f"{name}-{i}", 400 + 10 * j + i, r=2 + 3 * i) for i in range(5)]
                for j, name in enumerate(names)}  # fmt: skip
    published = {name: [lab.publish(name, payloads[name][0], aliases=("live",))] for name in names}
    prompts = [PREFIX + numbers(3, 1), PREFIX + numbers(5, 2), numbers(4, 3)]
    engine, fleet = serve(slots=3, rows=6)
    meant: list[tuple[Ticket, Version | None]] = []
    for _ in range(90):
        name, what = draw.choice(names), draw.random()
        if what < 0.15:
            published[name].append(lab.publish(name, payloads[name][len(published[name]) % 5]))
        elif what < 0.3:
            lab.registry.tag(draw.choice(published[name]).reference, "live")
        elif what < 0.75:
            wish = draw.choice((name, f"{name}@live", published[name][0].reference, None))
            expected = lab.registry.resolve(wish) if wish else None
            meant.append((ask(engine, draw.choice(prompts), 6, adapter=wish), expected))
        else:
            engine.step()
            check_seats(engine, fleet)
    engine.run()
    for ticket, version in meant:
        oracle.check(ticket, version)
    used = {version.id: version for _, version in meant if version is not None}
    contents = {version.manifest.files["adapter_model.safetensors"].sha256: version for version in used.values()}
    assert len(contents) >= 5
    told_apart(oracle, [None, *contents.values()], prompts, 6)


def test_aliases_that_one_thread_moves_while_another_asks(lab: Lab, oracle: Oracle, serve: Serve) -> None:
    """Versions only ever follow one another, so what a name meant lies between what it means before and after."""
    order = [lab.lora("moving", 450, r=4)]
    lab.registry.tag(order[0].reference, "live")
    payloads = [lab.payload(f"moving-{i}", 450 + i, r=2 + i) for i in range(1, 7)]
    prompts = [PREFIX + numbers(2, 1), numbers(6, 2)]
    engine, fleet = serve(slots=3, rows=4, waiting=4)
    spans: list[tuple[Ticket, str, str]] = []
    wrong: list[BaseException] = []

    def until(count: int) -> None:
        while len(spans) < count and not wrong:
            threading.Event().wait(0.001)

    def move() -> None:
        for i, payload in enumerate(payloads):
            until(6 * (i + 1))
            order.append(lab.publish("moving", payload))
            until(6 * (i + 1) + 3)
            lab.registry.tag(order[-1].reference, "live")

    def submit() -> None:
        for i in range(60):
            while len(order) < min(i // 8, len(payloads)) and not wrong:  # asking does not run away from publishing
                threading.Event().wait(0.001)
            name = ("moving", "moving@live")[i % 2]
            while not wrong:
                before = lab.registry.resolve(name).id
                try:
                    ticket = ask(engine, prompts[i % 3 % 2], 5, adapter=name)
                except EngineBusy:
                    threading.Event().wait(0.001)
                    continue
                spans.append((ticket, before, lab.registry.resolve(name).id))
                break

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (move, submit)]
    for thread in threads:
        thread.start()
    while engine.step() or any(thread.is_alive() for thread in threads):
        if not engine.running:
            threading.Event().wait(0.0005)
    assert not wrong
    assert len(spans) == 60
    place = {version.id: i for i, version in enumerate(order)}
    used = Counter(ticket.identity.id for ticket, _, _ in spans)
    assert len(used) >= 5
    assert sum(before == after for _, before, after in spans) > 30
    for ticket, before, after in spans:
        assert place[before] <= place[ticket.identity.id] <= place[after]
        oracle.check(ticket, ticket.identity)
    told_apart(oracle, [None, *order], prompts, 5)
    check_seats(engine, fleet)


def test_a_prompt_that_was_kept_is_taken_by_its_own_version_alone(lab: Lab, oracle: Oracle, serve: Serve) -> None:
    """The same name and the same prompt, other contents: each version, and the base, reads it for itself, and once."""
    prompt, old = numbers(40, 3), lab.lora("again", 470)
    engine, fleet = serve(slots=4)
    ask(engine, numbers(3, 1), 1)
    engine.run()  # the first request measures what a token takes
    seen = read_by(fleet.bank.model)

    def answered(name: str | None, version: Version | None) -> tuple[int, int]:
        seen.clear()
        ticket = ask(engine, prompt, 5, adapter=name, logprobs=0)
        engine.run()
        oracle.check(ticket, version)
        return seen[0]

    assert answered("again", old) == (1, 40)
    new = lab.lora("again", 471)
    assert answered("again", new) == (1, 40)
    assert answered(None, None) == (1, 40)
    for name, version in (("again", new), (old.reference, old), (None, None)):
        assert answered(name, version) == (1, 1)
    told_apart(oracle, [old, new, None], [prompt], 5)


def test_a_row_on_its_way_is_shared_with_its_own_version_alone(lab: Lab, oracle: Oracle, serve: Serve) -> None:
    prompt, old = numbers(40, 4), lab.lora("ongoing", 480)
    engine, fleet = serve(slots=4, prefix_bytes=0)
    seen = read_by(fleet.bank.model)
    wishes: list[tuple[Ticket, Version | None]] = [(ask(engine, prompt, 20, adapter="ongoing", logprobs=0), old)]
    for _ in range(3):
        engine.step()
    new = lab.lora("ongoing", 481)
    for name, version, read in (("ongoing", new, 40), (None, None, 40), (old.reference, old, 1), ("ongoing", new, 1)):
        wishes.append((ask(engine, prompt, 6, adapter=name, logprobs=0), version))
        seen.clear()
        engine.step()
        assert seen[-1] == (1, read)
    assert not wishes[0][0].done
    engine.run()
    for ticket, version in wishes:
        oracle.check(ticket, version)
    told_apart(oracle, [old, new, None], [prompt], 6)


# ---- passes are shared


def test_a_short_request_of_another_adapter_is_done_first_in_passes_of_both(
    lab: Lab, oracle: Oracle, serve: Serve
) -> None:
    slow, quick = lab.lora("slow", 490, r=8), lab.lora("quick", 491, r=3)
    endless = replace(lab.backbone(), tokenizer=replace(lab.backbone().tokenizer, stop_ids=()))
    wishes = (("slow", numbers(9, 1), 200), ("quick", numbers(7, 2), 5))

    def alone() -> Iterator[int]:
        for name, prompt, new in wishes:
            engine, _ = serve(backbone=endless, slots=2)
            ask(engine, prompt, new, adapter=name)
            engine.run()
            yield engine.passes

    engine, fleet = serve(backbone=endless, slots=2)
    long = ask(engine, wishes[0][1], 200, adapter="slow")
    for _ in range(3):
        engine.step()
    short = ask(engine, wishes[1][1], 5, adapter="quick")
    while not short.done:
        engine.step()
        check_seats(engine, fleet)
    assert not long.done
    engine.run()
    for ticket, version in ((long, slow), (short, quick)):
        known = oracle.logprobs(version, ticket.request.prompt, ids(ticket))
        assert known[:-1].argmax(-1).tolist() == ids(ticket)
        assert len(ids(ticket)) == ticket.request.max_new_tokens
    apart = list(alone())
    assert apart == [200, 5]
    assert engine.passes == 201 < sum(apart), "one more than the long one alone: reading the short one's prompt"


# ---- a thousand


def test_a_thousand_adapters_answer_through_32_slots(lab: Lab, oracle: Oracle, serve: Serve, tmp_path: Path) -> None:
    versions = {f"t{i}": lab.written(f"t{i}", 5000 + i, r=(2, 4, 8)[i % 3]) for i in range(1000)}
    memory = bytes_of(lab, 8, slots=32)
    engine, fleet = serve(
        versions.__getitem__, slots=32, memory=memory, host_memory=bytes_of(lab, 4, slots=100), rows=48
    )
    draw = random.Random(4)
    names = [f"t{draw.choice((draw.randrange(1000), draw.randrange(40)))}" for _ in range(250)]
    tickets = [ask(engine, prompt_of(i % 7), 1 + i % 5, adapter=name) for i, name in enumerate(names)]
    most = 0
    while engine.step():
        check_seats(engine, fleet)
        most = max(most, len(fleet.statistics().resident))
    assert most == 32
    for ticket, name in zip(tickets[::8], names[::8], strict=True):
        oracle.check(ticket, versions[name])
    for ticket, name in zip(tickets, names, strict=True):
        assert ticket.completion is not None
        assert ticket.completion.adapter == versions[name].reference
        assert ticket.completion.finish in ("stop", "length")
    counted = fleet.statistics()
    assert counted.evictions > 100
    assert counted.from_disk.count > 100
