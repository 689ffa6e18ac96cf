"""A headless Chromium for tests of pages."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}  # width and height, pixels


@contextlib.contextmanager
def chromium() -> Iterator:
    """The browser, as Playwright drives it.

    Where none is installed the test is skipped: Chromium comes from the system, not from pip, so
    an environment made by `pip install` alone has none.
    """
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed here, and this is a test of a page in one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def tab(browser, screen: str, address: str, **settings) -> Iterator:
    """A page at an address, in which nothing may go wrong and nothing be wider than the screen."""
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height}, **settings)
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    yield page
    assert not problems
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    there, fits = page.evaluate(sizes)
    assert there <= fits, f"the page is {there} pixels wide on a screen of {fits}"
    page.close()
