"""Retrieval as tasks: regions and their texts, images and captions, images and long texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.collator import REGION_TEXTS
from ...encoders.cached import CachedEncoder
from ..image_sets import DOCCI_FILE, LAYOUTS, Images
from ..intervals import RESAMPLES
from ..pictures import QUERIES, SEARCHED, ComparedTexts, draw_first_image, draw_found_images, draw_found_regions
from ..report import Result
from ..retrieval import retrieval_chances, retrieval_measures, text_identities
from .base import Option, Task

# Of PixCLIP's published scripts: so many images, from the start of the file.
OFFICIAL_IMAGES = 1000
OFFICIAL_DATASETS = ("Flickr30k", "Urban1k", "DOCCI")
REGION_TEXT = Option("caption", "text of a region in region-retrieval and mask-sensitivity", REGION_TEXTS)


def retrieve_regions(
    encoder: CachedEncoder, data: Images, text: str = "caption", resamples: int = RESAMPLES
) -> Result:
    """Recall between regions and their texts, both ways (CLOC, section 4.2: GRIT, recall@10).

    Regions whose texts are equal up to case and white space share one key, which is right for all of them.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `regions`.
        text: field of the regions: `"caption"`, `"long_caption"` or `"category"`; regions without it are left out.
        resamples: the number of resamples of the bootstrap, which draws images.

    Returns:
        `region_to_text_recall@1`, `@5`, `@10`, `text_to_region_…`, median ranks and counts.

    Raises:
        ValueError: no region has the text.
    """
    records, texts, groups = [], [], []
    for number, record in enumerate(data.records):
        regions = [region for region in record["regions"] if region.get(text)]
        if regions:
            records.append({**record, "regions": regions})
            texts += [region[text] for region in regions]
            groups += [number] * len(regions)
    if not records:
        raise ValueError(f"No region of {data.name} has a `{text}`.")
    left_out = dict(data.left_out)
    if without := sum(len(record["regions"]) for record in data.records) - len(texts):
        left_out[f"regions without a {text}"] = without
    ids, first, keys = _distinct(texts)
    metrics, intervals = retrieval_measures(
        torch.cat(encoder.encode_records(records)),
        encoder.encode_texts(keys),
        ids,
        ids[first],
        names=("region", "text"),
        groups=(np.array(groups), np.array(groups)[first.numpy()]),
        resamples=resamples,
    )
    protocol = f"{text}, equal texts right for each other"
    chance = retrieval_chances(ids, ids[first], ("region", "text"))
    return Result("region-retrieval", data.name, protocol, metrics, intervals, data.split, left_out, chance=chance)


def _distinct(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """The [`text_identities`] of some texts, and of each identity the index of its first text, and that text."""
    ids = text_identities(texts)
    first = torch.tensor(np.unique(ids.numpy(), return_index=True)[1])
    return ids, first, [texts[index] for index in first]


def retrieve_images(
    encoder: CachedEncoder,
    data: Images,
    task: str = "image-text-retrieval",
    protocol: str | None = None,
    resamples: int = RESAMPLES,
) -> Result:
    """Recall between whole images and their captions, both ways.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `captions`.
        task: `"image-text-retrieval"` or `"long-text-retrieval"`.
        protocol: `corrected` (or None): every caption of every image. `official`: as PixCLIP's published scripts for
            Flickr30k, Urban1k and DOCCI, the first caption of each of the first 1,000 images, and a whole-image mask
            that was not scaled.
        resamples: the number of resamples of the bootstrap, which draws images.

    Returns:
        `image_to_text_recall@1`, `@5`, `@10`, `text_to_image_…`, median ranks and counts.

    Raises:
        ValueError: an unknown protocol, `official` for another dataset, or no image has a caption.
    """
    if protocol not in (None, "corrected", "official"):
        raise ValueError(f"`protocol` of {task} must be corrected or official, got {protocol!r}.")
    official = protocol == "official"
    if official and data.name.lower() not in map(str.lower, OFFICIAL_DATASETS):
        raise ValueError(
            f"`protocol` official repeats PixCLIP's scripts, which are of {', '.join(OFFICIAL_DATASETS)}, "
            f"got the dataset {data.name!r}: take corrected."
        )
    records = [record for record in data.records if record["captions"]]
    if not records:
        raise ValueError(f"No image of {data.name} has a caption.")
    left_out = dict(data.left_out)
    if without := len(data.records) - len(records):
        left_out["images without a caption"] = without
    records = records[:OFFICIAL_IMAGES] if official else records
    captions = [record["captions"][:1] if official else record["captions"] for record in records]
    owners = torch.tensor([number for number, texts in enumerate(captions) for _ in texts])
    metrics, intervals = retrieval_measures(
        encoder.encode_images([record["image"] for record in records], unscaled_mask=official),
        encoder.encode_texts([text for texts in captions for text in texts]),
        torch.arange(len(records)),
        owners,
        resamples=resamples,
    )
    chance = retrieval_chances(torch.arange(len(records)), owners)
    protocol = protocol or "corrected"
    return Result(task, data.name, protocol, metrics, intervals, data.split, left_out, chance=chance)


class RegionRetrieval(Task):
    """Between regions and their texts."""

    name = "region-retrieval"
    layout = LAYOUTS["region-retrieval"]
    primary_measure = "text_to_region_recall@10"
    options = {"region_text": REGION_TEXT}
    hub_task = "image-feature-extraction"

    def measure(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, resamples: int, **options: Any
    ) -> list[Result]:
        return [retrieve_regions(encoder, data, options["region_text"], resamples)]

    def draw(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, folder: str, name: str, **options: Any
    ) -> list[str]:
        field = options["region_text"]
        records = [
            {**record, "regions": [region for region in record["regions"] if region.get(field)]}
            for record in data.records
        ]
        records = [record for record in records if record["regions"]][:SEARCHED]
        given = [region[field] for record in records for region in record["regions"]]
        ids, _, keys = _distinct(given)
        own = dict(zip(given, ids.tolist(), strict=True))
        compared = ComparedTexts(keys, encoder.encode_texts(keys), lambda region: own[region[field]])
        best, found = f"best of {len(keys)} texts", f"what texts find among {len(given)} regions"
        title = f"{self.name} by `{field}`"
        return [
            *draw_first_image(encoder, records, compared, folder, name, f"{title}: {best}"),
            *draw_found_regions(encoder, records, compared, folder, name, f"{title}: {found}"),
        ]


class ImageTextRetrieval(Task):
    """Between whole images and their captions."""

    name = "image-text-retrieval"
    layout = LAYOUTS["image-text-retrieval"]
    protocols = ("official",)
    primary_measure = "text_to_image_recall@1"
    hub_task = "image-feature-extraction"

    def measure(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, resamples: int, **options: Any
    ) -> list[Result]:
        return [retrieve_images(encoder, data, self.name, protocol, resamples)]

    def draw(
        self, encoder: CachedEncoder, data: Images, protocol: str | None, folder: str, name: str, **options: Any
    ) -> list[str]:
        official = protocol == "official"
        records = [record for record in data.records if record["captions"]][:SEARCHED]
        texts = [record["captions"][0] for record in records[:QUERIES]]
        images = encoder.encode_images([record["image"] for record in records], unscaled_mask=official)
        title = f"{self.name}, {protocol or 'corrected'}: captions among {len(records)} images"
        return draw_found_images(images, encoder.encode_texts(texts), records, texts, folder, name, title)


class LongTextRetrieval(ImageTextRetrieval):
    """Between whole images and texts of many sentences."""

    name = "long-text-retrieval"
    layout = LAYOUTS["long-text-retrieval"]

    def read(
        self, data_dir: str | Sequence[str], split: str | None = None, protocol: str | None = None, **options: Any
    ) -> Images:
        in_folder = isinstance(data_dir, str) and Path(data_dir, DOCCI_FILE).is_file()
        if protocol == "official" and split is None and in_folder:
            # PixCLIP's DOCCI script takes the first thousand lines of the file, whatever their split.
            split = "all"
        return super().read(data_dir, split, protocol, **options)
