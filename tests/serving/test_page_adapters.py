"""Cards, the registry and the runs on the page, and changing from there what is served; behind two keys."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generation.adapters_lab import Lab
from serving.page_lab import PHONE, Visit, api, launched, visiting
from serving.server_lab import Server, serving

from peftkit.page import clean
from peftkit.registry.index import contents
from peftkit.registry.manifest import Draft, Version
from peftkit.registry.select import Filters, select
from peftkit.runs.folder import RunFolder
from peftkit.serving.page.document import document

pytestmark = [pytest.mark.page, pytest.mark.loopback]

KEY, ADMIN = "the-api-key-of-this-test", "the-admin-key-of-this-test"
DENIED = ("Failed to load resource: the server responded with a status of 40",)
SECRET = "a row of the run, which nobody else may read"
EVIL = "<img src=x onerror=alert(1)>\u202egnp " + "long" * 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, beside a file that no address leads to."""
    root = tmp_path_factory.mktemp("page") / "runs"
    folder = RunFolder.create(root, "lora_sft", {"note": SECRET}, {})
    folder.finish("done")
    (root.parent / "secret.html").write_text(SECRET)
    return root


@pytest.fixture(scope="module")
def versions(lab: Lab, runs: Path) -> list[Version]:
    """Two versions of `shown`; the first is `shown@prod`, and says of itself what a stranger might."""
    run = next(runs.iterdir()).name
    fields = {
        **lab.draft().model_dump(),
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", EVIL]},
        "recipe": {"name": EVIL, "sha256": "1" * 64},
        "run": run,
        "data": [{"role": "train", "source": EVIL, "sha256": "2" * 64, "rows": 12, "tokens": 345}],
        "metrics": {
            "before": {"answer_nll": {"point": 2.5, "low": 2.0, "high": 3.0}, EVIL: 1.0},
            "after": {"answer_nll": {"point": 0.5, "low": 0.25, "high": 0.75}},
            "other": {"answer_nll_change": {"point": -2.0, "low": -2.5, "high": -1.5}, "metric": EVIL},
        },
        "receipts": [{"type": EVIL, "source": EVIL}],
    }
    first = lab.registry.publish("shown", lab.payload("shown-1", 31), Draft.model_validate(fields), ("prod",))
    parent = {"name": "shown", "version": first.id, "relation": "continued"}
    again = Draft.model_validate({**lab.draft().model_dump(), "parents": [parent]})
    second = lab.registry.publish("shown", lab.payload("shown-2", 32), again)
    return [first, second]


@pytest.fixture(scope="module")
def server(lab: Lab, versions: list[Version], runs: Path) -> Iterator[Server]:
    with serving(lab, ["shown", "shown@prod"], runs=runs, api_key=KEY, admin_key=ADMIN) as running:
        yield running


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    with visiting(browser, server.address, DENIED) as opened:
        give(opened, ADMIN)
        yield opened


def give(visit: Visit, key: str) -> None:
    """Type a key where the page asks for one."""
    visit.page.wait_for_selector("#key:visible")
    assert visit.page.evaluate("document.activeElement.id") == "secret"
    visit.page.keyboard.type(key)
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector('main[aria-busy="true"], main[aria-busy="false"]')
    visit.until(lambda: visit.page.get_attribute("main", "aria-busy") == "false")


def answered(server: Server, model: str) -> str:
    """Which version the API answers with."""
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "Who?"}]}
    found: str = api(server.address, "/v1/chat/completions", body, KEY)["model"]
    return found.partition("@")[2]


def said(visit: Visit, card: str, expected: str) -> None:
    """What the card tells of a change, once it does, with the focus on it."""
    line = f'[data-model="{card}"] .said'
    visit.until(lambda: visit.page.locator(line).count() > 0 and expected in visit.page.inner_text(line))
    assert visit.page.evaluate("document.activeElement.className.startsWith('said')")


def test_keys_are_asked_for_and_kept_in_memory_alone(browser: Any, server: Server) -> None:
    with visiting(browser, server.address, DENIED) as visit:
        give(visit, "wrong")
        assert "does not open" in visit.text("#key-error")
        give(visit, KEY)
        assert visit.page.locator("#models input").count() == 3
        assert visit.page.is_hidden("#key")
        visit.ask("Keyed", 3)
        assert {each["state"] for each in visit.columns()} == {"done"}
        visit.go("registry")
        assert visit.text("#key-label") == "Admin key"
        give(visit, ADMIN)
        assert visit.page.locator("#registry-rows tbody tr").count() >= 1
        assert visit.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert not any(key in url for url in visit.asked for key in (KEY, ADMIN))
        visit.page.reload()
        visit.page.wait_for_selector("#key:visible")  # forgotten


def test_an_alias_moves_and_is_rolled_back_from_its_card(
    visit: Visit, lab: Lab, server: Server, versions: list[Version]
) -> None:
    first, second = versions
    visit.go("adapters")
    card = '[data-model="shown@prod"]'
    assert visit.text(f"{card} > header .mono") == first.id == answered(server, "shown@prod")
    visit.page.click(f'{card} [aria-label="Move shown@prod"]')
    visit.page.select_option(f"{card} .confirm select", second.id)
    visit.page.keyboard.press("Escape")  # changes nothing
    assert visit.page.locator(".confirm").count() == 0
    visit.page.click(f'{card} [aria-label="Move shown@prod"]')
    visit.page.select_option(f"{card} .confirm select", second.id)
    visit.page.click(f"{card} .confirm button.main")
    said(visit, "shown@prod", f"shown@prod answers with {second.id} now.")
    assert visit.text(f"{card} > header .mono") == second.id == answered(server, "shown@prod")
    assert lab.registry.aliases("shown")["prod"] == second.id
    visit.page.click(f'{card} [aria-label="Roll back shown@prod"]')
    assert first.id in visit.text(f"{card} .confirm")
    visit.page.keyboard.press("Enter")
    said(visit, "shown@prod", f"shown@prod is back at {first.id}. shown@prod answers with {first.id} now.")
    assert visit.text(f"{card} > header .mono") == first.id == answered(server, "shown@prod")
    visit.page.click(f'{card} summary:has-text("History")')
    assert visit.page.locator(f"{card} details[open] tbody tr").count() == len(lab.registry.history("shown")) == 5
    visit.page.locator(f"{card} details[open] tr", has_text="prod").locator("button").first.click()  # record 2
    with visit.page.expect_request("**/restore") as sent:
        visit.page.keyboard.press("Enter")
    assert sent.value.post_data_json == {"to": 2}
    said(visit, "shown@prod", f"shown@prod is back at {second.id}.")
    assert answered(server, "shown@prod") == second.id
    api_says = server.call(server.host.move("shown", "prod", first.id))
    assert [model.id for model in api_says] == ["shown@prod"]


def test_a_refused_change_says_why_and_changes_nothing(visit: Visit, lab: Lab) -> None:
    visit.go("adapters")
    before = lab.registry.aliases("shown")
    visit.page.click('[data-model="shown"] button:has-text("New alias")')
    visit.page.keyboard.type("not/an/alias")
    visit.page.keyboard.press("Enter")
    visit.until(lambda: "error" in (visit.page.get_attribute('[data-model="shown"] .said', "class") or ""))
    assert "not/an/alias" in visit.text('[data-model="shown"] .said')
    assert lab.registry.aliases("shown") == before


def test_names_are_attached_reloaded_and_detached(visit: Visit, server: Server) -> None:
    visit.go("registry")
    row = visit.page.locator("#registry-rows tr", has_text="tickets")
    row.locator("button:has-text('Attach')").click()
    said(visit, "tickets", "tickets is attached")
    assert [model.id for model in server.host.models()][1:] == ["shown", "shown@prod", "tickets"]
    visit.page.click('[aria-label="Reload tickets"]')
    said(visit, "tickets", "tickets is what the registry says")
    visit.page.click('[aria-label="Detach tickets"]')
    visit.page.keyboard.press("Enter")
    visit.until(lambda: "tickets is detached" in visit.text("#adapters-said"))
    assert [model.id for model in server.host.models()][1:] == ["shown", "shown@prod"]
    visit.page.fill("#attach-name", "nobody")
    visit.page.keyboard.press("Enter")
    visit.until(lambda: "nobody" in visit.text("#adapters-said"))


def test_a_card_tells_what_the_manifest_holds(visit: Visit, versions: list[Version]) -> None:
    visit.go("adapters")
    card = visit.page.locator('[data-model="shown@prod"]')
    visit.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    text = card.inner_text()
    for expected in ("2.50 [2.00, 3.00]", "0.50 [0.25, 0.75]", "-2.00 [-2.50, -1.50]", "better", "lora r=4 α=8", "345"):
        assert expected in text
    assert versions[0].reference in visit.page.locator('[data-model="shown"]').inner_text()  # its lineage


def test_hostile_manifests_are_text_and_nothing_else(visit: Visit) -> None:
    visit.page.set_viewport_size(PHONE)
    for view in ("adapters", "registry", "runs"):
        visit.go(view)
        visit.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        shown = visit.text(f"#{view}")
        assert ("<img src=x onerror=alert(1)>" in shown) == (view != "runs")
        assert clean(shown) == shown  # no override of direction
        assert visit.page.locator("img, [onerror]").count() == 0
        assert visit.fits()


def test_the_registry_is_filtered_as_list_does(visit: Visit, lab: Lab) -> None:
    visit.go("registry")
    known = contents(lab.registry)

    def shown() -> list[str]:
        rows = visit.page.locator("#registry-rows tbody th .mono").all_inner_texts()
        return sorted(rows)

    assert shown() == sorted({each.id for each in select(known).versions} | {known_served(known)})
    visit.page.select_option("#filter-alias", "prod")
    assert shown() == sorted(each.id for each in select(known, Filters(tag="prod")).versions)
    visit.page.select_option("#filter-alias", "")
    visit.page.check("#filter-all")
    assert shown() == sorted(each.id for each in known.versions)
    visit.page.select_option("#filter-served", "yes")
    assert shown() == sorted(each.id for each in known.versions if each.name == "shown")
    visit.page.fill("#filter-text", "LORA")
    assert shown() == sorted(each.id for each in select(known, Filters(method="lora"), every=True).versions)
    visit.page.fill("#filter-text", "nothing has this")
    assert shown() == []
    assert visit.text("#registry-said") == f"0 versions of {len(known.versions)}"


def known_served(known: Any) -> str:
    """What is served although it is not the latest of its name."""
    found: str = next(each.id for each in known.versions if "prod" in each.aliases and each.name == "shown")
    return found


def test_runs_open_in_a_page_of_their_own(visit: Visit, runs: Path) -> None:
    (folder,) = runs.iterdir()
    visit.go("runs")
    with visit.page.context.expect_page() as opened:
        visit.page.click(f"#runs a:has-text('{folder.name}')")
    page = opened.value
    page.wait_for_selector("h1")
    assert folder.name in page.inner_text("h1")
    assert SECRET in (page.text_content("main") or "")
    assert page.evaluate("getComputedStyle(document.querySelector('dl')).display") == "grid"  # its style is obeyed
    page.click("nav a >> nth=2")
    assert page.url.startswith("blob:")


def get(server: Server, path: str, key: str | None) -> tuple[int, str, Any]:
    request = urllib.request.Request(server.address + path, headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def test_private_rows_leave_with_the_admin_key_alone(server: Server, runs: Path) -> None:
    (folder,) = runs.iterdir()
    status, body, headers = get(server, f"/runs/{folder.name}", ADMIN)
    assert (status, SECRET in body) == (200, True)
    assert headers["Content-Security-Policy"] == document().policy_of_runs
    assert "script-src" not in document().policy_of_runs
    for path in ("/", "/cards", "/registry", "/runs", f"/runs/{folder.name}"):
        for key in (None, KEY):
            status, body, _ = get(server, path, key)
            assert SECRET not in body
            assert (status == 200) == (path == "/" or (path == "/cards" and key is not None))


@pytest.mark.parametrize(
    "path",
    [
        "..%2fsecret.html",
        "%2e%2e",
        "..",
        "../secret.html",
        "%2Fetc%2Fpasswd",
        "secret.html",
        "x%00y",
        "%ff",
        "a" * 5000,
    ],
)
def test_no_address_leads_out_of_the_folder_of_runs(server: Server, path: str) -> None:
    status, body, _ = get(server, f"/runs/{path}", ADMIN)
    assert status in (400, 404, 414)
    assert SECRET not in body
