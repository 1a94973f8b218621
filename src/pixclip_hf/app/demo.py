"""What a page of the demo shows, and how it is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..encoders.protocol import Encoder
from ..encoders.view_encoder import load_encoder
from ..mask_models import MaskModel
from ..outgoing import public_name

DEMO_MODEL = Path("runs/demo/cloc")


@dataclass(frozen=True)
class Demo:
    """What a page shows.

    Args:
        encoder: the model.
        name: what the page calls it.
        mask_model: makes masks of points.
        collection: what the page searches in; None leaves the search out.
    """

    encoder: Encoder
    name: str
    mask_model: MaskModel | None = None
    collection: Any = None


def load_demo(
    model: str | None = None, revision: str = "main", mask_model: str | None = None, index: str | None = None
) -> Demo:
    """Loads what a page shows.

    Args:
        model: folder or Hub id; when None the model of the collection, or else that of `make demo`.
        revision: of a Hub id.
        mask_model: folder or Hub id of a SAM.
        index: folder of `pixclip-hf embed`.

    Raises:
        ValueError: no model, one that embeds no regions or no texts, or one that did not make the collection.
    """
    if model is None and index is None and not DEMO_MODEL.is_dir():
        raise ValueError(
            f"`--model` must name a model, or {str(DEMO_MODEL)!r} must hold that of the demo: `make demo` trains it."
        )
    encoder: Any = None
    if model is not None or index is None:
        encoder = load_encoder(str(model or DEMO_MODEL), revision=revision)
    collection = None
    if index is not None:
        from ..search import Collection

        collection = Collection(index, encoder=encoder)
        encoder = collection.encoder
    name = encoder.model.name_or_path
    if encoder.processor.tokenizer is None:
        raise ValueError(f"`--model` must read texts, got {name!r}, whose processor has no tokenizer.")
    masks = None if mask_model is None else MaskModel.from_pretrained(mask_model)
    return Demo(encoder, public_name(name), masks, collection)
