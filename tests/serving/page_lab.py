"""Real Chromium on a real server: what it asks for, what it complains about, and what stands on the page."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}
SECONDS = 30.0
LOADED = 'main[aria-busy="false"]'

# Of every text that can be seen: its colour against what is painted behind it, by WCAG 2.2, 1.4.3.
CONTRASTS = """() => {
  const channels = (color) => color.match(/[0-9.]+/g).map(Number);
  const share = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * share(r / 255) + 0.7152 * share(g / 255) + 0.0722 * share(b / 255);
  const behind = (node) => {
    for (let each = node; each; each = each.parentElement) {
      const color = channels(getComputedStyle(each).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = Array.from(node.childNodes).some((each) => each.nodeType === 3 && each.data.trim());
    const written = own || ["INPUT", "TEXTAREA", "SELECT"].includes(node.tagName);
    const seen = node.checkVisibility({ visibilityProperty: true }) && !node.closest(".unseen, :disabled, script");
    if (!written || !seen) continue;
    const [a, b] = [light(channels(getComputedStyle(node).color)), light(behind(node))];
    found.push([`${node.tagName} ${node.className} ${node.textContent.slice(0, 30)}`,
      (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


def chromium() -> str:
    """The browser that PEFTKIT_CHROMIUM or the PATH names; a counted skip without one."""
    named = [os.environ.get("PEFTKIT_CHROMIUM") or "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in named if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: name one with PEFTKIT_CHROMIUM")
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser of its own, closed at the end."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One open page and all that went wrong on it."""

    page: Page
    address: str
    troubles: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """The address of every request."""

    def go(self, view: str) -> None:
        """Open a view by its link, and wait for what it loads."""
        self.page.click(f'nav a[href="#{view}"]')
        self.page.wait_for_selector(f"#{view}:visible")
        self.page.wait_for_selector(LOADED)

    def ask(self, prompt: str, limit: int = 24) -> list[dict[str, Any]]:
        """Ask all that are chosen; returns what stands in the columns at the end."""
        self.page.fill("#prompt", prompt)
        self.page.evaluate("(limit) => { document.getElementById('limit').value = limit }", limit)
        self.page.click("#send")
        return self.settled()

    def columns(self) -> list[dict[str, Any]]:
        """The columns as the page holds them, with the text and marks that are shown."""
        found: list[dict[str, Any]] = self.page.evaluate(
            """() => compare.columns.map((column) => ({
              model: column.model, state: column.state, told: column.told, shown: column.text.textContent,
              marks: Array.from(column.text.querySelectorAll("mark"), (mark) => mark.textContent),
              foot: column.foot.innerText, trouble: column.trouble.innerText,
              name: column.node.querySelector("h2").textContent,
              version: column.version.textContent, busy: column.node.getAttribute("aria-busy") }))"""
        )
        return found

    def settled(self) -> list[dict[str, Any]]:
        """The columns, once none is on its way."""
        ended = ("done", "failed", "stopped")
        self.until(lambda: (now := self.columns()) != [] and all(each["state"] in ended for each in now))
        return self.columns()

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something; the page's policy forbids playwright's own way, which evaluates text."""
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"it did not come; troubles: {self.troubles}"
            self.page.wait_for_timeout(10)

    def text(self, selector: str) -> str:
        """All text below what a selector finds first."""
        return self.page.inner_text(selector)

    def fits(self) -> bool:
        """Whether nothing reaches over the right edge."""
        widths: list[int] = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        return widths[0] <= widths[1]


@contextmanager
def visiting(browser: Browser, address: str, expected: tuple[str, ...] = (), **settings: Any) -> Iterator[Visit]:
    """The page at `/`, loaded; at the end nothing but `expected` may have gone wrong, and nobody else been asked."""
    context = browser.new_context(**{"viewport": DESK, **settings})
    context.set_default_timeout(SECONDS * 1000)
    page = context.new_page()
    visit = Visit(page, address)
    page.on("console", lambda message: visit.troubles.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: visit.troubles.append(str(error)))
    page.on("dialog", lambda dialog: visit.troubles.append(f"dialog {dialog.message}"))
    context.on("request", lambda request: visit.asked.append(request.url))
    page.goto(address)
    page.wait_for_selector(LOADED)
    try:
        yield visit
    finally:
        context.close()
    strangers = [url for url in visit.asked if not url.startswith((f"{address}/", f"blob:{address}/", "data:"))]
    assert not strangers, strangers
    unforeseen = [each for each in visit.troubles if not each.startswith(expected or ("\0",))]
    assert not unforeseen, unforeseen


def api(address: str, path: str, body: Any = None, key: str | None = None) -> Any:
    """What the API itself answers."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address + path, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=SECONDS) as response:
        return json.loads(response.read())
