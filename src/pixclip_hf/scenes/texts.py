"""Words of the procedural scenes: short and long region captions, image captions and a noisy alt text.

The wording is drawn once per scene, so that the long captions of a scene differ only by what they say.
"""

from collections.abc import Sequence

from .layout import COLORS, SHAPES, TEXTURES, DrawStream, SceneObject

EARLY_WORDS = 80  # the deciding details of twins come after this many words

_NUMBERS = {3: "three", 4: "four", 5: "five"}
_COLUMNS, _ROWS = ("left", "middle", "right"), ("upper", "middle", "lower")

_OPENINGS = (
    "This picture shows {count} simple shapes on a {background} background.",
    "On a {background} background there are {count} simple shapes.",
    "The image holds {count} shapes that lie on a {background} background.",
    "A {background} background carries {count} shapes of different looks.",
)
_SUBJECTS = (
    "The object described here is a {size} {colour} {shape}.",
    "This text is about one of them, a {size} {colour} {shape}.",
    "Attention goes to a {size} {colour} {shape} among them.",
    "One of them, a {size} {colour} {shape}, is meant here.",
)
_SURFACES = (
    "A closer look shows that its surface is {texture}.",
    "Its surface turns out to be {texture} all over.",
    "As for the surface of the object, it is {texture}.",
    "On closer inspection one finds that it is {texture}.",
)
_PLACES = (
    "It lies in the {place} part of the picture.",
    "Its place is in the {place} part of the scene.",
    "One finds it in the {place} part of the image.",
    "The object sits in the {place} part of the frame.",
)
_RELATIONS = (
    "It is {relation} the {neighbour}.",
    "Seen from its neighbour, it is {relation} the {neighbour}.",
    "The object appears {relation} the {neighbour}.",
    "Its position is {relation} the {neighbour}.",
)
# True of every scene and of every object in it; they name no shape, color, texture or place.
_FILLERS = (
    "Nothing moves and nothing hints at a time of day.",
    "There is no text, no person and no animal anywhere.",
    "The picture looks like a computer drawing rather than a photograph.",
    "Only simple geometric forms appear and each is easy to name.",
    "Everything in the scene is seen straight from the front.",
    "The background is calm with a faint grain all over it.",
    "The drawing is exactly as wide as it is high.",
    "The shapes are bright while the background stays muted and dull.",
    "No two objects in this picture look exactly the same.",
    "There are no lines that connect one object with another.",
    "Each object is upright and none of them is tilted.",
    "A viewer needs only a few seconds to take it in.",
    "No logo, signature or watermark has been added to the image.",
    "The same style of drawing is used for every object shown.",
    "No shadow falls on the ground behind any of the objects.",
    "The outlines are crisp and they are drawn without a pen line.",
    "It could be a page from a book for small children.",
    "The scene tells no story and has no hidden meaning.",
    "The number of objects is small enough to count at once.",
    "The light is even and comes from no direction in particular.",
    "None of the objects has eyes, hands or any other parts.",
    "The brightness of the background changes slowly across the image.",
    "Such pictures are often used to teach the names of forms.",
    "A few words are enough to say what can be seen.",
)

_CAPTIONS = (
    "A {background} background with {count} shapes: {things}. {relations}",
    "{things} on a {background} background, {count} shapes in total. {relations}",
    "This simple drawing shows {things} on a {background} background. {relations}",
)
_JUNK = (
    "stock image", "free vector download", "wallpaper HD", "buy now 50% off", "IMG_{n}.jpg", "DSC0{n}.JPG",
    "best price free shipping", "clip art set", "click to enlarge", "untitled-{n}", "geometry poster print",
    "kids room decor", "(c) photo {n}", "screenshot {n}.png", "pack of 10 stickers", "logo design idea",
)  # fmt: skip


def describe(shape: str, color: str, texture: str) -> str:
    """The short description of an object, for example "a striped red star".

    Raises:
        ValueError: for a shape, color or texture that scenes do not draw.
    """
    for name, value, known in (("shape", shape, SHAPES), ("color", color, COLORS), ("texture", texture, TEXTURES)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {value!r}")
    return f"a {texture} {color} {shape}"


def all_descriptions() -> list[str]:
    """The 256 different short descriptions, shapes outermost and textures innermost."""
    return [describe(shape, color, texture) for shape in SHAPES for color in COLORS for texture in TEXTURES]


def _short(item: SceneObject) -> str:
    return f"{item.texture} {item.color} {item.shape}"


def _look(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


def relation(item: SceneObject, other: SceneObject) -> str:
    """Where `item` is as seen from `other`, by their visible boxes and their drawing order."""
    ax0, ay0, ax1, ay1 = item.box
    bx0, by0, bx1, by1 = other.box
    gap_x, gap_y = max(bx0 - ax1, ax0 - bx1), max(by0 - ay1, ay0 - by1)
    if gap_x >= 0 or gap_y >= 0:
        if gap_x >= gap_y:
            return "to the left of" if ax1 <= bx0 else "to the right of"
        return "above" if ay1 <= by0 else "below"
    if ax0 > bx0 and ay0 > by0 and ax1 < bx1 and ay1 < by1 and other.shape == "ring":
        return "inside"
    if ax0 < bx0 and ay0 < by0 and ax1 > bx1 and ay1 > by1 and item.shape == "ring":
        return "around"
    return "in front of" if item.layer > other.layer else "behind"


def place_name(box: tuple[int, int, int, int], size: int) -> str:
    """The third of the image, each way, in which the center of a box lies: "upper left" … "middle" … "lower right"."""
    column = _COLUMNS[min((box[0] + box[2]) * 3 // (2 * size), 2)]
    row = _ROWS[min((box[1] + box[3]) * 3 // (2 * size), 2)]
    return row if row == column else f"{row} {column}"


def size_name(side: int, size: int) -> str:
    """The size class of an object by its side in percent of the image side."""
    percent = 100 * side // size
    return "tiny" if percent < 18 else "small" if percent < 27 else "medium-sized" if percent < 36 else "large"


def _by_distance(item: SceneObject, objects: Sequence[SceneObject]) -> list[SceneObject]:
    """The other objects, the one that it touches or is nearest to first."""

    def distance(other: SceneObject) -> tuple[bool, int, int]:
        touching = not relation(item, other).startswith(("to the", "above", "below"))
        dx = item.box[0] + item.box[2] - other.box[0] - other.box[2]
        dy = item.box[1] + item.box[3] - other.box[1] - other.box[3]
        return not touching, dx * dx + dy * dy, other.layer

    return sorted((other for other in objects if other is not item), key=distance)


def _filler(draws: DrawStream, words: int) -> str:
    """Filler sentences of at least `words` words; the last one is chosen to be as few too many as possible."""
    left = draws.shuffled(_FILLERS)
    longest = max(len(sentence.split()) for sentence in left)
    chosen = []
    while words > longest:
        chosen.append(left.pop())
        words -= len(chosen[-1].split())
    chosen.append(min(left, key=lambda sentence: (len(sentence.split()) < words, len(sentence.split()))))
    return " ".join(chosen)


def long_captions(draws: DrawStream, objects: Sequence[SceneObject], size: int, background: str) -> list[str]:
    """One long text (90 to 160 words) per object.

    Scene, shape, color and size come first. With twins (two objects of the same shape, color and side) what tells
    them apart, texture, place and neighbor, comes only after `EARLY_WORDS` words; in half of the other scenes it
    comes before the filler.
    """
    opening, subject, surface, place, relation_form = (
        draws.pick(forms) for forms in (_OPENINGS, _SUBJECTS, _SURFACES, _PLACES, _RELATIONS)
    )
    looks = [_look(item) for item in objects]
    late = len(set(looks)) < len(looks) or draws.chance(50)
    relations = 2 if draws.chance(25) else 1
    opening = opening.format(count=_NUMBERS[len(objects)], background=background)
    filler = _filler(draws, EARLY_WORDS - len(opening.split()) - len(subject.split()))
    texts = []
    for item in objects:
        first = subject.format(size=size_name(item.side, size), colour=item.color, shape=item.shape)
        details = [surface.format(texture=item.texture), place.format(place=place_name(item.box, size))]
        # The other twin would not do: only its texture, the very detail in question, could name it.
        neighbors = [other for other in _by_distance(item, objects) if _look(other) != _look(item)]
        for other in neighbors[:relations]:
            name = _look(other) if looks.count(_look(other)) == 1 else _short(other)
            details.append(relation_form.format(relation=relation(item, other), neighbour=name))
        parts = [opening, first, filler, *details] if late else [opening, first, *details, filler]
        texts.append(" ".join(parts))
    return texts


def image_captions(draws: DrawStream, objects: Sequence[SceneObject], background: str) -> list[str]:
    """One or two captions (20 to 60 words) that list the objects and one or two relations."""
    captions = []
    forms = draws.shuffled(_CAPTIONS)[: draws.between(1, 2)]
    for form in forms:
        order = draws.shuffled(objects)
        names = [f"a {_short(item)}" for item in order]
        sentences = []
        for item in order[: 2 if len(order) < 5 else 1]:
            other = _by_distance(item, objects)[0]
            sentences.append(f"The {_short(item)} is {relation(item, other)} the {_short(other)}.")
        text = form.format(
            background=background,
            count=_NUMBERS[len(objects)],
            things=", ".join(names[:-1]) + " and " + names[-1],
            relations=" ".join(sentences),
        )
        captions.append(text[0].upper() + text[1:])
    return captions


def alt_text(draws: DrawStream, objects: Sequence[SceneObject]) -> str:
    """What a web page might say: some of the objects, often less than whole, sometimes a wrong one, and junk."""
    parts = []
    for item in draws.shuffled(objects)[: draws.between(1, len(objects) - 1)]:
        parts.append(draws.pick((_short(item), _look(item), f"a {_look(item)}")))
    if draws.chance(30):
        parts.append(f"{draws.pick(COLORS)} {draws.pick(SHAPES)}")
    for junk in draws.shuffled(_JUNK)[: draws.between(1, 3)]:
        parts.append(junk.format(n=draws.between(100, 9999)))
    return draws.pick((" - ", " | ", ", ", " ")).join(draws.shuffled(parts))
