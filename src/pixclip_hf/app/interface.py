"""The page of the demo: Gradio's components, and which function answers which event."""

import functools
import os
from collections.abc import Callable
from html import escape
from typing import Any

from PIL import Image

from ..images import open_image
from ..processing.processing_regions import decode_rle
from ..scenes.dataset import make_scene
from . import predictions
from .demo import Demo
from .drawing import draw_drawn, draw_place, enlarged
from .predictions import Region
from .results import STYLE, caption, place_html, scores_html
from .session import ALSO_ON, BESIDE, BOX, NEW_POINT, Session

# Gradio reads it when it is imported: nothing is told to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402

MOST_BYTES = "32mb"  # of an uploaded image
BRUSH = "#d55e00"
BY_TEXT, BY_REGION = "a text", "a drawn region"
HEAD = "# {name}\n{sentence}"


def build_page(demo: Demo) -> gr.Blocks:
    """The page of a model, ready for `launch`."""
    kinds = predictions.region_kinds(demo.encoder, demo.mask_model)
    start, texts = first_session()
    with gr.Blocks(title=f"{demo.name} · pixclip-hf", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(HEAD.format(name=plain(demo.name), sentence=_sentence(demo)))
        session = gr.State(start)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=380):
                with gr.Tabs():
                    with gr.Tab("Boxes and points" if "point" in kinds else "Boxes"):
                        shown = gr.Image(
                            _view(start), type="filepath", image_mode=None, format="png",
                            sources=["upload", "clipboard"], buttons=[], label="Image", height=540, elem_id="shown",
                        )  # fmt: skip
                        # Not a class of ours: Gradio writes a file beside the module of each.
                        shown.preprocess = _uploaded_path
                        meanings = [BOX, NEW_POINT, ALSO_ON, BESIDE] if "point" in kinds else [BOX]
                        meaning = gr.Radio(
                            meanings, value=BOX, label="What a click is", visible=len(meanings) > 1, elem_id="meaning"
                        )
                    with gr.Tab("Paint a mask", elem_id="paint"):
                        canvas = gr.ImageEditor(
                            _background(start), type="pil", sources=(), transforms=(), layers=False, buttons=[],
                            brush=gr.Brush(default_size=24, colors=[BRUSH], color_mode="fixed"), format="png",
                            label="Paint over one region", height=600, elem_id="canvas",
                        )  # fmt: skip
                        add_mask = gr.Button("Add the painted mask as a region", elem_id="add_mask")
                summary = gr.Markdown(start.summary, elem_id="summary")
                with gr.Row():
                    undo = gr.Button("Undo", elem_id="undo")
                    clear = gr.Button("Remove all", elem_id="clear")
                    scene = gr.Button("Another scene", elem_id="scene")
            with gr.Column(scale=6, min_width=380), gr.Tabs():
                with gr.Tab("Which text is which region?"):
                    lines = gr.Textbox(
                        "\n".join(texts), label="Texts, one per line, of any length", lines=5, elem_id="lines"
                    )
                    compare = gr.Button("Compare", variant="primary", elem_id="compare")
                    scores = gr.HTML(elem_id="scores")
                with gr.Tab("Where is a text?", elem_id="where"):
                    text = gr.Textbox(texts[0], label="Text", lines=2, elem_id="text")
                    look = gr.Button("Look for it", variant="primary", elem_id="look")
                    heat = gr.Image(
                        type="pil", format="png", interactive=False, buttons=[], show_label=False, height=540,
                        elem_id="heat",
                    )  # fmt: skip
                    place = gr.HTML(elem_id="place")
                if demo.collection is not None:
                    with gr.Tab("Search", elem_id="search"):
                        _add_search(demo, session, texts[0])
        # What another region changes: results of others go, and a canvas keeps what is painted on it.
        changes = [session, shown, summary, scores]
        # What another image changes.
        renewals = [*changes, canvas, heat, place]

        def drawn(now: Session) -> tuple[Any, ...]:
            return now, _view(now), now.summary, ""

        def renewed(now: Session) -> tuple[Any, ...]:
            return *drawn(now), _background(now), None, ""

        @told
        def upload(now: Session, path: str) -> tuple[Any, ...]:
            return renewed(now.with_image(open_image(path)))

        @told
        def click(now: Session, way: str, event: gr.SelectData) -> tuple[Any, ...]:
            x, y = event.index
            return drawn(now.clicked(x, y, way))

        @told
        def paint(now: Session, painted: dict[str, Any] | None) -> tuple[Any, ...]:
            size = now.opened_image().size
            mask = predictions.mask_of_layers((painted or {}).get("layers") or [], size)
            return *drawn(now.with_region(Region(mask=mask))), _background(now)

        @told
        def next_scene(now: Session) -> tuple[Any, ...]:
            return renewed(scene_session(now.scene))

        @told
        def compare_texts(now: Session, written: str) -> str:
            found = predictions.read_texts(written)
            scored = predictions.score_regions(demo.encoder, now.opened_image(), now.regions, found, demo.mask_model)
            return scores_html(now.regions, scored, predictions.cut_texts(demo.encoder, found))

        @told
        def look_for(now: Session, written: str) -> tuple[Image.Image, str]:
            image = now.opened_image()
            found = predictions.find_text(demo.encoder, image, written)
            return draw_place(image, found), place_html(found, predictions.cut_texts(demo.encoder, [written]))

        read = shown.upload(upload, [session, shown], renewals, show_progress="hidden")
        # What could not be read makes way for the image before it.
        read.failure(_view, session, shown, show_progress="hidden")
        shown.clear(lambda now: renewed(now.with_image(None)), session, renewals, show_progress="hidden")
        # Two quick clicks are two: the second one waits for the first.
        shown.select(click, [session, meaning], changes, show_progress="hidden", trigger_mode="multiple")
        add_mask.click(paint, [session, canvas], [*changes, canvas], show_progress="hidden")
        undo.click(lambda now: drawn(now.without_last()), session, changes, show_progress="hidden")
        clear.click(lambda now: drawn(now.with_image(now.image)), session, changes, show_progress="hidden")
        scene.click(next_scene, session, renewals, show_progress="hidden")
        compare.click(compare_texts, [session, lines], scores)
        look.click(look_for, [session, text], [heat, place])
    return page


def _add_search(demo: Demo, session: gr.State, text: str) -> None:
    by = gr.Radio([BY_TEXT, BY_REGION], value=BY_TEXT, label="Look for", elem_id="by")
    written = gr.Textbox(text, label="Text", lines=2, elem_id="query")
    number = gr.Number(1, label="Number of the region", precision=0, minimum=1, visible=False, elem_id="number")
    button = gr.Button(f"Search {len(demo.collection):,} embeddings", variant="primary", elem_id="find")
    gallery = gr.Gallery(columns=3, show_label=False, object_fit="contain", buttons=[], elem_id="hits", format="png")

    @told
    def find(now: Session, way: str, words: str, chosen: int | None) -> list[tuple[Image.Image, str]]:
        if way == BY_TEXT:
            found = predictions.search_text(demo.collection, words)
        else:
            image = now.opened_image()
            if chosen is None or not 1 <= chosen <= len(now.regions):
                raise ValueError(f"The number must be that of a drawn region, from 1 to {len(now.regions)}.")
            region = now.regions[int(chosen) - 1]
            found = predictions.search_region(demo.collection, image, region, mask_model=demo.mask_model)
        return [(hit.image, caption(hit)) for hit in found]

    by.change(
        lambda way: (gr.update(visible=way == BY_TEXT), gr.update(visible=way == BY_REGION)), by, [written, number]
    )
    button.click(find, [session, by, written, number], gallery)


def first_session() -> tuple[Session, list[str]]:
    """A drawn scene with its regions, and texts to compare them with. Regions that share one box are given by their
    masks, which tell them apart."""
    record = make_scene(0, split="test")
    regions, boxes = [], [tuple(region["box"]) for region in record["regions"]]
    for region, box in zip(record["regions"], boxes, strict=True):
        mask = decode_rle(region["mask"]) if boxes.count(box) > 1 else None
        regions.append(Region(box=box) if mask is None else Region(mask=mask))
    texts = [region["caption"] for region in record["regions"]]
    return Session(record["image"], tuple(regions), scene=1), [*dict.fromkeys(texts), "a plain red disc"]


def scene_session(index: int) -> Session:
    """A drawn scene without regions."""
    return Session(make_scene(index, split="test")["image"], scene=index + 1)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is wrong with an input is shown on the page, in the words of the package."""

    @functools.wraps(function)
    def answered(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except (ImportError, OSError, TypeError, ValueError) as error:
            # Gradio shows HTML.
            raise gr.Error(escape(str(error)), duration=None, print_exception=False) from error

    return answered


def launch_demo(demo: Demo, **options: Any) -> gr.Blocks:
    """Serves a page.

    Args:
        demo: what it shows.
        options: of `gradio.Blocks.launch`.

    Returns:
        The page.

    Raises:
        OSError: the port is taken.
    """
    page = build_page(demo)
    page.queue(default_concurrency_limit=1).launch(**launch_options() | options)
    return page


def launch_options() -> dict[str, Any]:
    """What `launch` takes beside address and port: nothing of the page comes from elsewhere, and nothing is sent."""
    fonts: Any = ["system-ui", "sans-serif"]
    return {
        "theme": gr.themes.Default(primary_hue="indigo", font=fonts, font_mono=["monospace"]),
        "css": STYLE,
        "max_file_size": MOST_BYTES,
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "share": False,
    }


def plain(name: str) -> str:
    """A name as Markdown that shows it."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#" else letter for letter in name)


def _sentence(demo: Demo) -> str:
    model = demo.encoder.model
    how = {"cloc": "reads any number of regions out of one image pass", "pixclip": "sees a region through its mask"}
    way = how.get(model.config.model_type, "sees a region in a crop of its image")
    return f"A model of {type(model).__name__.removesuffix('Model')}, which {way}. Draw regions, then compare them."


def _uploaded_path(payload: gr.data_classes.ImageData | None) -> str | None:
    """The file of an upload, which Gradio has checked to be one. Gradio's own way is to open it before any function of
    ours runs, and the page is not told what is wrong with it."""
    return None if payload is None else payload.path


def _view(session: Session) -> Image.Image | None:
    return None if session.image is None else draw_drawn(session.image, session.regions, session.corner)


def _background(session: Session) -> Image.Image | None:
    """What is painted over; of small pixels, as `_view`."""
    return None if session.image is None else enlarged(session.image)
