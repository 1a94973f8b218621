"""The demo on a port of its own, and a page of it in a real browser that reaches nothing else."""

import shutil
from contextlib import contextmanager
from urllib.parse import urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser():
    """Path of a Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def served(demo):
    """The address of a demo's page while the block runs."""
    from pixclip_hf.app.interface import launch_demo

    page = launch_demo(demo, prevent_thread_lock=True, quiet=True)
    try:
        yield page.local_url
    finally:
        page.close()


@contextmanager
def opened(address, width=1360, height=1000):
    """A page of the browser at an address, and the addresses elsewhere that it asked for, which get no answer."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox, which needs rights that containers do not have; the page is our own.
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)
        strangers = []

        def answer(route):
            if urlsplit(route.request.url).netloc == urlsplit(address).netloc:
                return route.continue_()
            strangers.append(route.request.url)
            return route.abort()

        page.route("http*://**", answer)
        try:
            page.goto(address)
            page.wait_for_selector("#shown img")
            yield page, strangers
        finally:
            browser.close()
