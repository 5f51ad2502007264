"""The page that compares answers, in real Chromium on a real server."""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from serving.page_lab import CONTRASTS, PHONE, Visit, api, launched, visiting
from serving.server_lab import Server

from peftkit.page import clean
from peftkit.serving.page.document import document

pytestmark = [pytest.mark.page, pytest.mark.loopback]

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> \u202eevil\u202c " + "w" * 3000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    with visiting(browser, server.address) as opened:
        yield opened


def messages(prompt: str, limit: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": limit, "temperature": 0}


def streamed(*pieces: str, **more: Any) -> str:
    """An answer as the server writes one."""
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}], **more})
    return "".join(f"data: {json.dumps(each)}\n\n" for each in chunks) + "data: [DONE]\n\n"


def fulfil(visit: Visit, *answers: dict[str, Any]) -> None:
    """Answer the next requests of the page with bytes of our own."""
    left = iter(answers)
    visit.page.route("**/v1/chat/completions", lambda route: route.fulfill(**next(left)))


def common(a: list[str], b: list[str]) -> int:
    """Length of a longest common subsequence, by the textbook."""
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(new[-1], row[j + 1]))
        row = new
    return row[-1]


def is_within(short: list[str], long: list[str]) -> bool:
    rest = iter(long)
    return all(word in rest for word in short)


def words(visit: Visit, text: str) -> list[str]:
    found: list[str] = visit.page.evaluate("(text) => wordsOf(text).map((word) => word.text)", text)
    return found


def test_answers_stream_into_all_columns_and_are_those_of_the_api(visit: Visit, server: Server) -> None:
    columns = visit.ask("Compare us.", 24)
    base = server.host.models()[0].id
    assert [each["model"] for each in columns] == [base, "tickets", "sql"]
    assert len({each["shown"] for each in columns}) == 3
    for column in columns:
        whole = api(server.address, "/v1/chat/completions", {"model": column["model"], **messages("Compare us.", 24)})
        assert column["shown"] == clean(whole["choices"][0]["message"]["content"])
        assert column["told"]["tokens"] == whole["usage"]["completion_tokens"]
        assert column["told"]["pieces"] > 1
        assert 0 < column["told"]["first"] <= column["told"]["seconds"]
        assert re.search(r"first token \d+\.\d\d s\s+24 tokens\s+[\d.]+ tokens/s\s+cut at the limit", column["foot"])
        assert column["busy"] == "false"
    versions = [None, *(model.version for model in server.host.models()[1:])]
    assert [each["version"] for each in columns] == [version.id if version else "" for version in versions]
    assert "has answered" in (visit.page.text_content("#announced") or "")


def test_the_words_that_differ_are_marked_and_no_others(visit: Visit) -> None:
    columns = {each["name"]: each for each in visit.ask("Mark what differs.", 40)}
    for against in ("base", "tickets"):
        visit.page.select_option("#against", label=against)
        columns = {each["name"]: each for each in visit.columns()}
        reference = words(visit, columns[against]["shown"])
        assert columns[against]["marks"] == []
        for name in columns.keys() - {against}:
            whole = words(visit, columns[name]["shown"])
            marked = [word for mark in columns[name]["marks"] for word in words(visit, mark)]
            kept = len(whole) - len(marked)
            assert marked
            assert kept == common(reference, whole)
            missing = len(reference) - kept
            assert f"{len(marked)} word" in columns[name]["foot"]
            assert f"{missing} word" in columns[name]["foot"] or missing == 0
    visit.page.select_option("#against", "")
    assert not any(each["marks"] for each in visit.columns())


def test_differing_words_are_what_a_longest_common_subsequence_leaves(visit: Visit) -> None:
    by_hand = [
        ("the red house", "the blue house", [False, True, False]),
        ("the red house", "the house", [False, False]),
        ("a b", "", []),
        ("", "new words", [True, True]),
        ('{"intent":"refund"}', '{"intent":"invoice"}', [False, False, False, False, False, False, True, False, False]),
        ("same  text\n", "same text", [False, False]),
        ("東京です", "京都です", [False, True, False, False]),
        ("x Cafe\u0301", "x Cafe\u0301s", [False, True]),
    ]
    for before, after, expected in by_hand:
        assert visit.page.evaluate("([a, b]) => differing(a, b)", [before, after]) == expected, (before, after)
    draw = random.Random(7)
    pairs = [[" ".join(draw.choices("abcdef", k=draw.randrange(30))) for _ in range(2)] for _ in range(300)]
    found = visit.page.evaluate("(pairs) => pairs.map(([a, b]) => differing(a, b))", pairs)
    for (before, after), differs in zip(pairs, found, strict=True):
        reference, whole = before.split(), after.split()
        kept = [word for word, other in zip(whole, differs, strict=True) if not other]
        assert is_within(kept, reference)
        assert len(kept) == common(reference, whole)
        blocks = difflib.SequenceMatcher(None, reference, whole, autojunk=False).get_matching_blocks()
        assert len(kept) >= sum(block.size for block in blocks)
    long = " ".join(map(str, range(6000)))
    assert visit.page.evaluate("([a, b]) => differing(a, b)", ["x " + long[::-1] + " y", "y " + long + " z"]) is None


def test_it_is_used_with_the_keyboard_alone(visit: Visit, server: Server) -> None:
    page = visit.page
    page.click("summary")
    wanted = page.evaluate(
        """() => {
          const all = document.querySelectorAll("a[href], button, input, select, textarea, summary");
          return Array.from(all).filter((each) => each.checkVisibility() && !each.disabled).length;
        }"""
    )
    page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges(); window.visited = []")
    for _ in range(2 * wanted):  # once around at least, wherever it began
        page.evaluate(
            """() => { const at = document.activeElement, shown = at.closest(".chips label") || at;
              if (at.matches(":focus-visible")) visited.push([at, getComputedStyle(shown).outlineStyle]) }"""
        )
        page.keyboard.press("Tab")
    assert page.evaluate(
        "[new Set(visited.map(([at]) => at)).size, visited.every(([, style]) => style !== 'none')]"
    ) == [
        wanted,
        True,
    ]
    page.focus("#limit")
    page.keyboard.press("Control+a")
    page.keyboard.type("400")
    page.focus("#prompt")
    page.keyboard.type("Stop me")
    page.keyboard.press("Control+Enter")
    visit.until(lambda: any(each["told"]["pieces"] for each in visit.columns()))
    page.keyboard.press("Escape")
    columns = visit.settled()
    assert "stopped" in {each["state"] for each in columns}
    assert {each["busy"] for each in columns} == {"false"}
    assert page.is_disabled("#stop")
    visit.until(lambda: server.host.engine.load().running == 0)  # the slots are free again


def test_earlier_prompts_come_back_and_are_stored_nowhere(visit: Visit) -> None:
    visit.ask("First", 2)
    visit.ask("Second", 2)
    visit.page.select_option("#earlier", label="First")
    assert visit.page.input_value("#prompt") == "First"
    assert visit.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_no_more_streams_at_once_than_a_browser_has_connections(visit: Visit) -> None:
    assert visit.page.evaluate(
        """async () => {
          let [now, most, ended] = [0, 0, 0];
          stream = async () => { now += 1; most = Math.max(most, now); await null; await null; now -= 1; ended += 1 };
          drawModels("base", Array.from({ length: 20 }, (_, index) => `a${index}`));
          for (const box of document.querySelectorAll("#models input")) box.checked = true;
          await ask();
          return [most, ended];
        }"""
    ) == [5, 21]


def test_errors_stand_in_their_column_and_429_is_tried_again(browser: Any, server: Server) -> None:
    with visiting(browser, server.address, ("Failed to load resource",)) as visit:
        for box in visit.page.query_selector_all("#models input")[1:]:
            box.uncheck()
        busy = {"error": {"message": "256 requests wait", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
        torn = streamed("half an ans").partition('data: {"choices": [{"delta": {}')[0]
        broken = f"{torn}data: {json.dumps({'error': {'message': 'cut off after 600 s'}})}\n\n"
        fulfil(
            visit,
            {"status": 429, "headers": {"Retry-After": "3"}, "json": busy},
            {"body": torn},
            {"body": broken},
            {"body": streamed("a", "b", usage={"completion_tokens": 7})},
        )
        (column,) = visit.ask("Busy?")
        assert column["trouble"].startswith("256 requests wait Try again in 3 seconds.")
        said = []
        for _ in range(3):
            visit.page.click("button:has-text('Try again')")
            (column,) = visit.settled()
            said.append((column["state"], column["shown"], column["trouble"].partition("\n")[0]))
        assert said == [
            ("failed", "half an ans", "The answer broke off before its end."),
            ("failed", "half an ans", "cut off after 600 s"),
            ("done", "ab", ""),
        ]
        assert "7 tokens" in column["foot"]


def test_hostile_answers_are_text_and_nothing_else(browser: Any, server: Server) -> None:
    with visiting(browser, server.address, viewport=PHONE) as visit:
        texts = (HOSTILE, HOSTILE.replace("evil", "good"), HOSTILE)
        fulfil(visit, *[{"body": streamed(*text)} for text in texts])  # a character a piece
        columns = visit.ask("Attack")
        assert columns[0]["shown"] == clean(HOSTILE)
        assert "\u202e" not in columns[0]["shown"]
        assert sorted(len(each["marks"]) for each in columns) in ([0, 0, 1], [0, 1, 1])  # who was asked first is open
        assert visit.page.locator("img").count() == 0
        assert visit.page.locator("#columns script").count() == 0
        assert visit.fits()


def test_the_policy_lets_nothing_run_but_the_pages_own_script(browser: Any, server: Server) -> None:
    expected = (
        "Executing inline",
        "Refused",
        "This document requires",
        "Loading",
        "Connecting",
        "Fetch API",
        "Applying",
    )
    with visiting(browser, server.address, expected) as visit:
        ran = visit.page.evaluate(
            """async () => {
              const script = document.createElement("script");
              try { script.text = "window.ran = 1" } catch {}
              document.body.append(script);
              try { document.body.innerHTML += "<img src=x onerror='window.ran = 2'>" } catch { window.refused = true }
              try { await fetch("https://example.org/") } catch { window.alone = true }
              const style = document.createElement("style");
              style.textContent = "body { display: none }";
              document.body.append(style);
              return [window.ran, window.refused, window.alone, getComputedStyle(document.body).display];
            }"""
        )
        assert ran == [None, True, True, "block"]
    assert "unsafe" not in document().policy


def test_all_text_can_be_read_in_light_and_dark(visit: Visit) -> None:
    visit.ask("Light or dark?")
    papers = set()
    for view in ("compare", "adapters", "registry", "runs"):
        visit.go(view)
        for scheme in ("light", "dark"):
            visit.page.emulate_media(color_scheme=scheme)
            found = visit.page.evaluate(CONTRASTS)
            assert len(found) >= 8
            assert [each for each in found if each[1] < 4.5] == []
            papers.add(visit.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


def test_a_phone_shows_all_without_scrolling_sideways(browser: Any, server: Server) -> None:
    with visiting(browser, server.address, viewport=PHONE) as visit:
        visit.ask("Narrow " + "x" * 300)
        for view in ("compare", "adapters", "registry", "runs"):
            visit.go(view)
            visit.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
            assert visit.fits(), view


def test_motion_stops_where_it_is_not_wanted(browser: Any, server: Server) -> None:
    still = "getComputedStyle(document.querySelector('.column .text'), '::after').animationName"
    with visiting(browser, server.address, reduced_motion="reduce") as visit:
        visit.ask("Calm", 2)
        visit.page.evaluate("compare.columns[0].node.setAttribute('aria-busy', 'true')")
        assert visit.page.evaluate(still) == "none"
