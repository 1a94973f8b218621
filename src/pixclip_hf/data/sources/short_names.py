"""Short names of sources in one word, `KIND:PART:…`: `scenes:1000:0`, and an older spelling of some other kinds.

Their parts are told apart by colons and commas, which paths may hold as well: the words `coco annotations=… images=…`
have no such limit.
"""

from typing import Any

# The form of a name, its kind, and the arguments that its parts stand for.
_FORMS = {
    "scenes:NUMBER[:SEED]": ("scenes", ("number", "seed")),
    "regions:FOLDER": ("regions", ("folder",)),
    "images:FOLDER": ("images", ("folder",)),
    "dataset:NAME_OR_FOLDER[:SPLIT]": ("dataset", ("path", "split")),
    "coco:ANNOTATIONS.json[,CAPTIONS.json]:IMAGES": ("coco", ("annotations", "images")),
    "refcoco:REFS.p:INSTANCES.json:IMAGES": ("refcoco", ("refs", "instances", "images")),
    "vg:REGION_DESCRIPTIONS_OR_OBJECTS.json:IMAGES": ("vg", ("annotations", "images")),
    "flickr30k:ENTITIES:IMAGES": ("flickr30k", ("folder", "images")),
    "grit:FOLDER": ("grit", ("folder",)),
}
FORMS = tuple(_FORMS)


def read_short_name(name: str) -> tuple[str, dict[str, Any]] | None:
    """Kind and arguments of a short name; None for a name of another form.

    Raises:
        ValueError: a part is missing, or there is one too many.
    """
    prefix, colon, rest = name.partition(":")
    form = next((form for form in _FORMS if colon and form.startswith(f"{prefix}:")), None)
    if form is None:
        return None
    kind, names = _FORMS[form]
    # `images:C:\photos`: a kind of one part takes all of it.
    parts = rest.split(":") if len(names) > 1 else [rest]
    least = len(names) - form.count("[:")
    if not least <= len(parts) <= len(names) or not all(parts):
        raise ValueError(f"`source` must have the form {form}, got {name!r}.")
    arguments: dict[str, Any] = dict(zip(names, parts, strict=False))
    if kind == "coco":
        arguments["annotations"] = arguments["annotations"].split(",")
    return kind, arguments
