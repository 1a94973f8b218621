"""Retrieval as tasks: regions and their texts, images and captions, images and long texts."""

import numpy as np
import torch

from .cache import CachedEncoder
from .image_sets import Images
from .intervals import RESAMPLES
from .report import Result
from .retrieval import retrieval_measures, text_identities

# Of PixCLIP's published scripts: so many images, from the start of the file.
OFFICIAL_IMAGES = 1000
OFFICIAL_DATASETS = ("Flickr30k", "Urban1k", "DOCCI")


def retrieve_regions(
    encoder: CachedEncoder, data: Images, text: str = "caption", resamples: int = RESAMPLES
) -> Result:
    """Recall between regions and their texts, both ways (CLOC, section 4.2: GRIT, recall@10).

    Regions with the same text (but for case and white space) are right for each other's, each text is one key.

    Args:
        encoder: a [`CachedEncoder`].
        data: images with `regions`.
        text: field of the regions: `"caption"`, `"long_caption"` or `"category"`; regions without it are left out.
        resamples: of the bootstrap, which draws images.

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
    ids = text_identities(texts)
    first = torch.tensor(np.unique(ids.numpy(), return_index=True)[1])
    keys = [texts[index] for index in first]
    regions = torch.cat(encoder.embed_regions(records))
    metrics, intervals = retrieval_measures(
        regions,
        encoder.embed_texts(keys),
        ids,
        ids[first],
        names=("region", "text"),
        groups=(np.array(groups), np.array(groups)[first.numpy()]),
        resamples=resamples,
    )
    protocol = f"{text}, equal texts right for each other"
    return Result("region-retrieval", data.name, protocol, metrics, intervals, data.split, left_out)


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
        resamples: of the bootstrap, which draws images.

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
        encoder.embed_images([record["image"] for record in records], unscaled=official),
        encoder.embed_texts([text for texts in captions for text in texts]),
        torch.arange(len(records)),
        owners,
        resamples=resamples,
    )
    return Result(task, data.name, protocol or "corrected", metrics, intervals, data.split, left_out)
