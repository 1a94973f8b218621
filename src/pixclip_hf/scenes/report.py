"""What the demo shows of a model: a table beside chance, a front picture, and a page of scenes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.whole_files import write_utf8
from ..encoders.region_encoder import RegionEncoder
from ..evaluation.report import markdown_table, share, with_current_names
from ..processing.processing_regions import decode_rle
from ..visualization import draw_answers, draw_regions, similarity_map
from .dataset import all_descriptions, late_detail_pairs, make_scene, same_box_pairs

PAGE_SCENES = 12
DESCRIPTIONS = (
    ("region_description_exact", "region described by {prompt}, exact of 256", "0.4 %"),
    ("region_description_texture", "… texture of 4", "25 %"),
    ("region_description_color", "… color of 8", "12.5 %"),
    ("region_description_shape", "… shape of 8", "12.5 %"),
)
# (measure, what it is of, label, chance); rows whose measure a model does not have are left out.
ROWS = (
    *((name, "region_description_count", label, chance) for name, label, chance in DESCRIPTIONS),
    ("region_description_exact_mask", "region_description_count", "region described by mask, exact of 256", "0.4 %"),
    (
        "region_description_exact_point",
        "region_description_count",
        "region described by a point, exact of 256",
        "0.4 %",
    ),
    ("region_description_exact_pooled", "region_description_count", "region pooled under its mask, exact", "0.4 %"),
    ("crop_description_exact", "region_description_count", "region from its crop, same tower, exact", "0.4 %"),
    ("same_box_by_mask_caption", None, "same box, told apart by the mask and short captions", "50 %"),
    ("same_box_by_mask", None, "same box, told apart by the mask and long captions", "50 %"),
    ("crop_same_box", None, "… from crops, same tower", "50 %"),
    ("late_detail", None, "texts that differ only late, told apart", "50 %"),
    ("late_detail_cut_77", None, "… with the texts cut to 77 tokens", "50 %"),
    ("crop_late_detail", None, "… from crops, same tower", "50 %"),
    ("grounding_accuracy", None, "box of a caption found, IoU of at least 0.5", "–"),
    ("grounding_ap", None, "… average precision beside two absent texts for each", "–"),
    ("image_to_text_recall@1", "image_count", "image to caption, recall@1", None),
    ("text_to_image_recall@1", "image_count", "caption to image, recall@1", None),
)
# Measured in ties alone, which have no error; and a mean of precisions, which is no share of its count.
WITHOUT_ERROR = ("late_detail_cut_77", "grounding_ap")
# Unseen scenes whose regions the report lists with what they are described as.
LISTED_SCENES = 4


def report(model_type: str, metrics: Mapping[str, Any], folder: Path, answers: Sequence[tuple[str, str]] = ()) -> str:
    """Writes report.md: every measure beside chance and, where the model inherited its towers, beside theirs; and what
    single regions are described as.

    Args:
        model_type: `"cloc"` or `"pixclip"`.
        metrics: the measures of the default setting, of the hard one under `hard_*` and of the inherited towers under
            `towers_*`; `seed`, `train_steps`, `train_seconds` and, with towers, `towers_seconds`.
        folder: where it goes.
        answers: predicted and true caption of single regions, as [`describe_regions`] gives them.
    """
    metrics = with_current_names(metrics)
    columns = {"scenes (objects 20–45 % of the side)": "", "hard (8–45 %)": "hard_"}
    inherited = "towers_image_count" in metrics
    if inherited:
        columns["inherited towers, scenes"] = "towers_"
    prompt = "mask" if model_type == "pixclip" else "box"
    rows = []
    for name, count, label, chance in ROWS:
        if name not in metrics or (name == "region_description_exact_mask" and prompt == "mask"):
            continue
        chance = chance or f"{100 / metrics['image_count']:.1f} %"
        cells = [_cell(metrics, start, name, count or f"{name}_count") for start in columns.values()]
        rows.append([label.format(prompt=prompt), *cells, chance])
    seconds = f"{metrics['train_steps']} steps in {metrics['train_seconds']:.0f} s"
    if inherited:
        seconds += f" from towers trained in {metrics['towers_seconds']:.0f} s"
    text = (
        f"# {model_type} on scenes\n\n"
        f"Trained for {seconds}, seed {metrics['seed']}; evaluated on {metrics['image_count']} unseen scenes. Shares "
        f"with their standard error.\n\n{markdown_table(['measure', *columns, 'chance'], rows)}\n\n"
        f"{_answers_text(answers)}{PICTURE_RULES[model_type]}\n\n![regions](regions.png)\n\n"
        f"The first {PAGE_SCENES} unseen scenes, whatever the model says of them:\n\n![scenes](scenes.png)\n"
    )
    write_utf8(folder / "report.md", text)
    return text


def _answers_text(answers: Sequence[tuple[str, str]]) -> str:
    if not answers:
        return ""
    rows = [(f"{'✓' if answer == truth else '✗'} {answer}", truth) for answer, truth in answers]
    right = sum(answer == truth for answer, truth in answers)
    table = markdown_table(["predicted, best of 256", "true caption"], rows)
    return f"All regions of the first {LISTED_SCENES} unseen scenes, {right} of {len(answers)} right:\n\n{table}\n\n"


def _cell(metrics: Mapping[str, Any], start: str, name: str, count: str) -> str:
    if name in WITHOUT_ERROR:
        return f"{100 * metrics[start + name]:.1f} % of {int(metrics[start + count])}"
    return share(metrics, start + name, start + count)


# Which scene is the front picture, decided before any prediction is seen.
FIND = {"cloc": late_detail_pairs, "pixclip": same_box_pairs}
PICTURE_RULES = {
    "cloc": "The picture is the first unseen scene with two regions whose long captions differ only late.",
    "pixclip": "The picture is the first unseen scene with two regions of one box.",
}


def draw_front(model: Any, processor: Any, folder: Path, seed: int) -> None:
    """regions.png: an unseen scene chosen by [`PICTURE_RULES`], what its regions are described as, and where the model
    sees two of them."""
    encoder = RegionEncoder(model, processor)
    find = FIND[model.config.model_type]
    scene = next(scene for scene in (make_scene(i, "test", seed) for i in range(10**6)) if find(scene))
    regions = scene["regions"]
    names = all_descriptions()
    (embeds,) = encoder.encode_records([scene], convert_to_tensor=True)
    described: Any = encoder.encode_texts(names, convert_to_tensor=True)
    best = (embeds @ described.T).topk(2)
    texts = [
        [(names[index], score) for index, score in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    captions = [regions[index]["caption"] for index in find(scene)[0]]
    draw_regions(
        folder / "regions.png",
        scene["image"],
        [region["box"] for region in regions],
        texts,
        {caption: similarity_map(encoder, scene["image"], caption) for caption in captions},
        masks=_masks(encoder, scene),
        title=f"{type(model).__name__} on an unseen scene: the best of 256 descriptions",
        truths=[region["caption"] for region in regions],
    )


def describe_regions(model: Any, processor: Any, seed: int, count: int = LISTED_SCENES) -> list[tuple[str, str]]:
    """Predicted and true caption of every region of the first unseen scenes, whatever the model says of them."""
    scenes = [make_scene(i, "test", seed) for i in range(count)]
    truths = [region["caption"] for scene in scenes for region in scene["regions"]]
    answers = _describe(RegionEncoder(model, processor), scenes)
    return list(zip([answer for row in answers for answer in row], truths, strict=True))


def draw_page(model: Any, processor: Any, folder: Path, seed: int, count: int = PAGE_SCENES) -> None:
    """scenes.png: the first unseen scenes, and what each region is described as."""
    encoder = RegionEncoder(model, processor)
    scenes = [make_scene(i, "test", seed) for i in range(count)]
    answers = _describe(encoder, scenes)
    masks: list[Any] = [_masks(encoder, scene) for scene in scenes]
    draw_answers(
        folder / "scenes.png",
        [scene["image"] for scene in scenes],
        [[region["box"] for region in scene["regions"]] for scene in scenes],
        answers,
        [[region["caption"] for region in scene["regions"]] for scene in scenes],
        masks=masks if encoder.prompt == "mask" else None,
        title=f"{type(model).__name__}: the first {count} unseen scenes, described by {encoder.prompt}",
    )


def _describe(encoder: RegionEncoder, scenes: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The best of all descriptions for each region of each scene."""
    names = all_descriptions()
    descriptions: Any = encoder.encode_texts(names, convert_to_tensor=True)
    return [
        [names[index] for index in (rows @ descriptions.T).argmax(-1).tolist()]
        for rows in encoder.encode_records(list(scenes), convert_to_tensor=True)
    ]


def _masks(encoder: RegionEncoder, scene: Mapping[str, Any]) -> list[Any] | None:
    return [decode_rle(region["mask"]) for region in scene["regions"]] if encoder.prompt == "mask" else None


__all__ = ["describe_regions", "draw_front", "draw_page", "report"]
