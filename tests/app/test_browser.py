"""The demo in a real browser, as a visitor uses it: `make test-app`."""

import re
from pathlib import Path

import pytest
from browser import find_browser, opened, served
from conftest import build_tiny
from PIL import Image
from tiny_sam import save_tiny_sam

import pixclip_hf
from pixclip_hf import RegionEncoder
from pixclip_hf.app.demo import Demo, load_demo
from pixclip_hf.mask_models import MaskModel

pytestmark = pytest.mark.app
GUIDE = (Path(__file__).parents[2] / "docs" / "app.md").read_text(encoding="utf-8")
COMPARED = "#scores .region"


@pytest.fixture(autouse=True, scope="module")
def tools(request):
    if "app" not in request.config.getoption("markexpr"):
        pytest.skip("drives a browser: `make test-app` runs these")
    for name in ("gradio", "playwright"):
        pytest.importorskip(name)
    if find_browser() is None:
        pytest.skip("no Chromium or Chrome on the PATH: `make test-app` installs Debian's")


@pytest.fixture(scope="module")
def folder(tools, tmp_path_factory):
    """A working folder with a tiny CLOC at the demo's place, a collection, a SAM and images."""
    folder = tmp_path_factory.mktemp("place")
    for part in build_tiny(pixclip_hf.CLOCConfig, pixclip_hf.CLOCModel, pixclip_hf.CLOCProcessor):
        part.save_pretrained(folder / "runs/demo/cloc")
    save_tiny_sam(folder / "sam")
    image = Image.linear_gradient("L").resize((80, 60)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # on its side
    image.save(folder / "photo.jpg", exif=exif)
    (folder / "broken.png").write_bytes(b"no image")
    from pixclip_hf.embedding.command import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["--source", "scenes:4", "--model", "runs/demo/cloc", "--output", "runs/search"])
    return folder


@pytest.fixture
def page(folder, monkeypatch):
    """The page of the demo's model with its collection."""
    monkeypatch.chdir(folder)
    with served(load_demo(index="runs/search")) as address, opened(address) as (page, strangers):
        yield page
        assert strangers == []


def click_at(page, x, y):
    """Clicks the image where (x, y) says, shares of its sides, and waits for what it draws."""
    image = page.locator("#shown img")
    before, box = image.get_attribute("src"), image.bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.wait_for_function("before => document.querySelector('#shown img').src !== before", arg=before)


def summary(page, text):
    page.locator("#summary", has_text=text).wait_for()


def error(page, text):
    """Waits for an error and closes it."""
    toast = page.locator(".toast-body", has_text=text)
    toast.first.wait_for()
    page.locator(".toast-close").first.click()


def test_boxes_masks_texts(page, folder):
    summary(page, "5 regions")
    page.click("#compare")
    page.wait_for_selector(COMPARED)
    assert page.locator(COMPARED).count() == 5 and "%" in page.inner_text("#scores")
    page.click("#clear")
    summary(page, "Draw a region")
    page.locator(COMPARED).first.wait_for(state="detached")
    page.click("#compare")
    error(page, "No region is drawn")
    click_at(page, 0.1, 0.2)
    summary(page, "opposite corner")
    click_at(page, 0.4, 0.6)
    summary(page, "1 region of")
    page.get_by_role("tab", name="Paint a mask").click()
    # What is painted over comes after the canvas.
    page.wait_for_selector("#canvas canvas")
    page.wait_for_timeout(3000)
    page.click("#add_mask")
    error(page, "Nothing is painted")
    canvas = page.locator("#canvas canvas").first.bounding_box()
    for y in range(40, 60, 4):
        page.mouse.move(canvas["x"] + 0.3 * canvas["width"], canvas["y"] + y / 100 * canvas["height"])
        page.mouse.down()
        page.mouse.move(canvas["x"] + 0.5 * canvas["width"], canvas["y"] + y / 100 * canvas["height"], steps=8)
        page.mouse.up()
    page.wait_for_timeout(1000)
    page.click("#add_mask")
    summary(page, "2 regions")
    page.fill("#lines textarea", "a disc\na star <b>in bold</b>\n" + 60 * "a long text ")
    page.click("#compare")
    page.wait_for_selector(COMPARED)
    assert page.locator(COMPARED).count() == 2 and "<b>in bold</b>" in page.inner_text("#scores")
    assert "only the beginning counts" in page.inner_text("#scores")
    page.fill("#lines textarea", "a disc\na disc")
    page.click("#compare")
    error(page, "more than once")
    page.click("#undo")
    summary(page, "1 region of")


def test_where_and_search(page):
    page.get_by_role("tab", name="Where is a text?").click()
    page.click("#look")
    page.wait_for_selector("#heat img")
    assert "Box" in page.inner_text("#place")
    page.get_by_role("tab", name="Search").click()
    page.click("#find")
    page.wait_for_selector("#hits img")
    assert page.locator("#hits button img").count() == 6
    by_text = page.inner_text("#hits")
    page.get_by_label("a drawn region").check()
    page.fill("#number input", "9")
    page.click("#find")
    error(page, "from 1 to 5")
    page.fill("#number input", "2")
    page.click("#find")
    page.wait_for_function("before => document.querySelector('#hits').innerText !== before", arg=by_text)


def test_own_images_and_scenes(page, folder):
    page.click("#scene")
    summary(page, "Draw a region")
    page.get_by_label("Remove Image").click()
    summary(page, "Drop an image")
    page.click("#compare")
    error(page, "There is no image")
    page.set_input_files("#shown input[type=file]", folder / "photo.jpg")
    summary(page, "Draw a region")
    click_at(page, 0.2, 0.2)
    click_at(page, 0.7, 0.8)
    # Upright, as everywhere in the package.
    summary(page, "60 × 80")
    page.click("#compare")
    page.wait_for_selector(COMPARED)
    page.get_by_label("Remove Image").click()
    summary(page, "Drop an image")
    page.set_input_files("#shown input[type=file]", folder / "broken.png")
    error(page, "is not an image that PIL can read")
    page.locator("#shown img").wait_for(state="detached")
    summary(page, "Drop an image")
    page.set_input_files("#shown input[type=file]", folder / "photo.jpg")
    click_at(page, 0.2, 0.2)
    summary(page, "opposite corner")


def test_points(folder):
    classes = (pixclip_hf.PixCLIPConfig, pixclip_hf.PixCLIPModel, pixclip_hf.PixCLIPProcessor)
    masks = MaskModel.from_pretrained(str(folder / "sam"), device="cpu")
    demo = Demo(RegionEncoder(*build_tiny(*classes)), "org/pixclip", masks)
    with served(demo) as address, opened(address) as (page, strangers):
        assert page.get_by_role("tab", name="Search").count() == 0
        page.click("#clear")
        summary(page, "Draw a region")
        page.get_by_label("One more point on it").check()
        box = page.locator("#shown img").bounding_box()
        page.mouse.click(box["x"] + 50, box["y"] + 50)
        error(page, "no region of points")
        for way, place in (("Point", 0.3), ("One more point on it", 0.4), ("Point beside it", 0.9)):
            page.get_by_label(way, exact=True).check()
            click_at(page, place, place)
        summary(page, "1 region of")
        page.click("#compare")
        page.wait_for_selector(COMPARED)
        page.get_by_role("tab", name="Where is a text?").click()
        page.click("#look")
        page.wait_for_selector("#heat img")
        assert "finds no boxes" in page.inner_text("#place")
    assert strangers == []


def test_the_snippet_of_the_guide(folder, monkeypatch):
    """Of docs/app.md, on a port that is free."""
    monkeypatch.chdir(folder)
    (snippet,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)
    names = {}
    exec(snippet.replace("server_port=7860, ", "").replace('launch("', 'page = launch("'), names)
    try:
        with opened(names["page"].local_url) as (page, strangers):
            assert "runs/demo/cloc" not in page.inner_text("h1") and "cloc" in page.inner_text("h1")
    finally:
        names["page"].close()
    assert strangers == []
