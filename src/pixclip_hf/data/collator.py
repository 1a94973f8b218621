"""From records of the one schema to training batches of either model."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..record import LeftOut, foreign
from .points import point_of, training_points
from .skipping import ReadableRecords, readable_rows

REGION_TEXTS = ("caption", "long_caption", "category")
# Above any number of kinds of region text, which begins the seeds of that draw.
PROMPT_STREAM, POINT_STREAM = 1000, 1001
# What stands where a text is missing; no loss sees it.
NO_TEXT = "-"


class UnusableRecord(ValueError):
    """A record that no batch can be made of; the message names it.

    Attributes:
        position: where it stands in the batch.
    """

    def __init__(self, message: str, position: int = 0):
        super().__init__(message)
        self.position = position


def region_inputs(regions: Sequence[Sequence[Mapping[str, Any]]], prompt: str) -> dict[str, list[list[Any]]]:
    """The regions of each record as the arguments of a processor.

    Args:
        regions: the regions of each record, with `box` and `mask`.
        prompt: `"box"` gives `boxes`, `"mask"` gives `masks`: the rectangle of the box where a region has no mask;
            `"point"` gives `points`, one inside each region, as [`point_of`] draws it.

    Raises:
        ValueError: another `prompt`.
    """
    if prompt not in ("box", "mask", "point"):
        raise ValueError(f"`prompt` must be 'box', 'mask' or 'point', got {prompt!r}.")
    if prompt == "point":
        return {"points": [[[point_of(region)] for region in rows] for rows in regions]}
    if prompt == "box":
        return {"boxes": [[list(region["box"]) for region in rows] for rows in regions]}
    return {"masks": [[region["mask"] or _rectangle(region["box"]) for region in rows] for rows in regions]}


def sample_key(record: Mapping[str, Any]) -> tuple[int, ...]:
    """What decides the draws of a record: the key that it carries, or that of its content."""
    return record["sample_key"] if "sample_key" in record else content_key(record)


def content_key(record: Mapping[str, Any]) -> tuple[int]:
    """A number that names a record by its captions and the ids of its regions, wherever it is stored."""
    ids = [region["id"] for region in record["regions"] or ()]
    return (zlib.crc32(repr((record["captions"], ids)).encode()),)


def record_name(record: Mapping[str, Any]) -> str:
    """What a reader finds a record by: its file, its epoch and index, and the ids of its first regions, as far as they
    are known."""
    image = record.get("image")
    file = record.get("file") or (image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", ""))
    parts = [f"image {str(file)!r}"] if file else []
    if "sample_key" in record:
        parts.append(f"sample key {tuple(record['sample_key'])}")
    ids = [region.get("id") for region in record.get("regions") or ()]
    parts.append(f"region ids {ids[:5]}{' …' if len(ids) > 5 else ''}" if ids else "no regions")
    return ", ".join(parts)


def captions_of(record: Mapping[str, Any]) -> list[str]:
    """The captions of a record that say something."""
    return [caption for caption in record["captions"] or () if caption and caption.strip()]


def regions_with(record: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """The regions of a record that have a text of this kind."""
    return [region for region in record["regions"] or () if (region.get(kind) or "").strip()]


def _rectangle(box: Sequence[float]) -> list[list[float]]:
    x0, y0, x1, y1 = box
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def _region_text(region: Mapping[str, Any], kind: str) -> str:
    return f"a {region[kind]}" if kind == "category" else region[kind]


def without_images(records: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The records of a `datasets.Dataset` without their images, which would be decoded; others as they are."""
    return readable_rows(records, ["captions", "regions"]) if hasattr(records, "select_columns") else records


def first_encoded(records: Any) -> Mapping[str, Any]:
    """The first record, of a `datasets.Dataset` with the image encoded: so it names its file."""
    if not hasattr(records, "cast_column"):
        return next(iter(records))
    from datasets import Image

    return {"sample_key": (0, 0), **next(iter(records.select([0]).cast_column("image", Image(decode=False))))}


class RegionDataset(ReadableRecords):
    """Records with a key that names the epoch and the record.

    The collator draws regions and captions from that key alone: a run that resumes, or uses another number of workers,
    sees the same batches. The epoch lives in shared memory, where workers that outlast an epoch see it change.

    Args:
        records, max_corrupt_share: as in [`ReadableRecords`].
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], max_corrupt_share: float = 0.01):
        super().__init__(records, max_corrupt_share)
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """To be called at the start of every epoch. [`RegionTrainer`] does; accelerate's data loader does too, but for
        a sharded or resumed one."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, at = self.read(index)
        return {**record, "sample_key": (self.epoch, at)}


class RegionCollator:
    """Samples regions and their texts from records and runs the processor on them.

    A record trains on what it has: an image without captions on its regions, an image without regions on its caption.
    Regions without the text of the batch are left out of it. The batch has the same tensors whatever its records lack:
    region slots that hold no region are padding, and a missing caption is a text whose `attention_mask` is all padding
    (a row of zeros among `text_states`), which no loss counts.

    Args:
        processor: the processor of the model to train.
        regions_per_image: the most regions per image, drawn without replacement from those that have the text.
        region_text: `"caption"` (short), `"long_caption"`, `"category"` (as `a {category}`), or several of them, of
            which each batch draws one (a kind that is named twice, twice as often): within one batch the less specific
            text would be a false negative of the other. On several ranks the batches of a step may draw different
            kinds, which are such negatives of each other, because the draw depends on the batch alone, so that a run
            that resumes repeats it.
        image_captions: adds one caption per image as `input_ids`.
        whole_image_share: share of the images whose first region slot is the whole image with an image caption
            (Alpha-CLIP mixes 10 %). An image without any region always takes that slot when the share is above zero;
            an image without captions never does.
        crops: adds the crops of PixCLIP's second and third branch.
        seed: the seed of the draws.
        text_cache: a [`TextEmbeddingCache`] that holds [`RegionCollator.texts`] of the records; its states then take
            the place of the token ids.
        mask_prompt_share: share of the batches whose regions prompt by their masks, the others by their boxes. None
            uses only the usual prompt of the processor's model.
        point_prompt_share: share of the batches whose regions prompt by points, drawn inside and beside them; of the
            others `mask_prompt_share` prompt by masks. For a CLOC with `config.prompter_points`. The boxes go along
            for the grounding loss.
        allow_nothing: makes batches of records that have nothing to learn from too, whose loss is 0. One such batch is
            no reason to end a run: [`RegionTrainer`] allows it and looks at all records instead.

    Raises:
        ValueError: an argument outside its range; when called, a batch of records that have nothing to learn from,
            unless `allow_nothing`.
    """

    def __init__(
        self,
        processor: Any,
        regions_per_image: int = 4,
        region_text: str | Sequence[str] = "caption",
        image_captions: bool = True,
        whole_image_share: float = 0.0,
        crops: bool = False,
        seed: int = 0,
        text_cache: Any = None,
        mask_prompt_share: float | None = None,
        point_prompt_share: float = 0.0,
        allow_nothing: bool = False,
    ):
        if regions_per_image < 1:
            raise ValueError(f"`regions_per_image` must be at least 1, got {regions_per_image}.")
        region_texts = (region_text,) if isinstance(region_text, str) else tuple(region_text)
        if not region_texts or not set(region_texts) <= set(REGION_TEXTS):
            raise ValueError(f"`region_text` must be one or several of {REGION_TEXTS}, got {region_text!r}.")
        if not 0 <= whole_image_share <= 1:
            raise ValueError(f"`whole_image_share` must lie in [0, 1], got {whole_image_share}.")
        prompts = processor.prompts
        if mask_prompt_share is None:
            mask_prompt_share = float(prompts[0] == "mask")
        if not 0 <= mask_prompt_share <= 1:
            raise ValueError(f"`mask_prompt_share` must lie in [0, 1], got {mask_prompt_share}.")
        if mask_prompt_share < 1 and "box" not in prompts:
            raise ValueError(f"`mask_prompt_share` must be 1: boxes prompt no such model, got {mask_prompt_share}.")
        if not 0 <= point_prompt_share <= 1:
            raise ValueError(f"`point_prompt_share` must lie in [0, 1], got {point_prompt_share}.")
        if point_prompt_share > 0 and "point" not in prompts:
            raise ValueError(f"`point_prompt_share` must be 0: points prompt no such model, got {point_prompt_share}.")
        if point_prompt_share > 0 and whole_image_share > 0:
            raise ValueError(
                f"`point_prompt_share` must be 0 with `whole_image_share`: no point prompts a whole image, got "
                f"{point_prompt_share} and {whole_image_share}."
            )
        if crops and not processor.has_crops:
            raise ValueError(f"`crops` must be False: a {type(processor).__name__} makes none, got {crops}.")
        self.processor = processor
        self.mask_prompt_share = mask_prompt_share
        self.point_prompt_share = point_prompt_share
        self.regions_per_image = regions_per_image
        self.region_texts = region_texts
        self.image_captions = image_captions
        self.whole_image_share = whole_image_share
        self.crops = crops
        self.seed = seed
        self.text_cache = text_cache
        self.allow_nothing = allow_nothing

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | bool]:
        """
        Args:
            records: records in the schema, with the image decoded; `sample_key` (see [`RegionDataset`]) decides the
                draws. A record without it always gives the same draws, by its captions and the ids of its regions.

        Returns:
            The batch that the model's `forward` takes, `return_loss` included.

        Raises:
            UnusableRecord: the processor refuses a record; the message names its file, sample key and region ids.
            ValueError: nothing can be learned from the batch.
        """
        images, regions, texts, captions = [], [], [], []
        keys = [sample_key(record) for record in records]
        # A stream of its own: what is drawn of a record must not depend on its place in the batch.
        kind_rng = np.random.default_rng((len(self.region_texts), self.seed, *keys[0]))
        kind = self.region_texts[kind_rng.integers(len(self.region_texts))]
        for record, key in zip(records, keys, strict=True):
            rng = np.random.default_rng((self.seed, *key))
            record_regions, record_texts, caption = self._sample(record, kind, rng)
            images.append(record["image"])
            regions.append(record_regions)
            texts.append(record_texts)
            captions.append(caption)
        bare = not any(regions)
        if bare:
            if not self.allow_nothing and not (self.image_captions and any(captions)):
                raise ValueError(f"Nothing can be learned from this batch. {self.advice(records, kind)}")
            # With a slot of padding it has the keys of any batch, as other ranks expect.
            regions[0], texts[0] = [self._whole_image(records[0])], [None]
        # A stream of its own again, so that mixing prompts changes no other draw.
        by_mask = np.random.default_rng((PROMPT_STREAM, self.seed, *keys[0])).random() < self.mask_prompt_share
        # Boxes of records are pixels, however small.
        settings: dict[str, Any] = {"normalized": False, **({"return_crops": True} if self.crops else {})}
        arguments: dict[str, Any] = {"images": images, **region_inputs(regions, "mask" if by_mask else "box")}
        if np.random.default_rng((POINT_STREAM, self.seed, *keys[0])).random() < self.point_prompt_share:
            arguments = {"images": images, **self._by_points(regions, records, keys)}
            settings["prompt"] = "point"
        if self.text_cache is not None:
            batch = {**self._processed(records, arguments, settings), **self._text_states(texts, captions)}
        else:
            if self.image_captions:
                arguments["text"] = [caption or NO_TEXT for caption in captions]
            arguments["region_text"] = [[text or NO_TEXT for text in row] for row in texts]
            batch = self._processed(records, arguments, settings)
            missing = [position for position, caption in enumerate(captions) if not caption]
            if missing and "attention_mask" in batch:
                batch["attention_mask"][missing] = 0
        if bare:
            for name in ("region_attention_mask", "region_text_attention_mask"):
                if name in batch:
                    batch[name].zero_()
        return {**batch, "return_loss": True}

    def _by_points(
        self, regions: list[list[Any]], records: Sequence[Mapping[str, Any]], keys: list[tuple[int, ...]]
    ) -> dict[str, Any]:
        """The boxes of regions, for the grounding loss, and the points that prompt them."""
        arguments: dict[str, Any] = {**region_inputs(regions, "box"), "points": [], "point_labels": []}
        for rows, record, key in zip(regions, records, keys, strict=True):
            # A third number, so that no draw of a batch is one of its first record.
            rng = np.random.default_rng((POINT_STREAM, self.seed, *key, 1))
            drawn = [training_points(region, record["image"].size, rng) for region in rows]
            arguments["points"].append([points for points, _ in drawn])
            arguments["point_labels"].append([labels for _, labels in drawn])
        return arguments

    def _processed(
        self, records: Sequence[Mapping[str, Any]], arguments: Mapping[str, list[Any]], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the processor makes of a batch.

        Args:
            records: what the batch is made of.
            arguments: name -> its value for each record; settings: arguments of the whole batch.

        Raises:
            UnusableRecord: the processor refuses one of the records.
        """
        try:
            with foreign("batch not made", detail=True):
                return self.processor(**arguments, **settings)
        except LeftOut as error:
            cause = error.__cause__ or error
        # An error of the whole batch names a place in it, which no one finds again: each record is tried by itself.
        for position, record in enumerate(records):
            own: dict[str, Any] = {**{name: [values[position]] for name, values in arguments.items()}, **settings}
            if not any(own[name][0] for name in ("boxes", "masks") if name in own):
                own = {"images": own["images"]}  # no regions are no fault
            try:
                with foreign("record not usable", detail=True):
                    self.processor(**own)
            except LeftOut as error:
                raise UnusableRecord(f"{record_name(record)}: {error}", position) from error.__cause__
        raise cause

    def can_learn(self, record: Mapping[str, Any]) -> bool:
        """Whether any batch trains on something of this record; its image is not looked at."""
        if (self.image_captions or self.whole_image_share > 0) and captions_of(record):
            return True
        return any(regions_with(record, kind) for kind in self.region_texts)

    def check(self, records: Iterable[Mapping[str, Any]], name: str) -> None:
        """Stops a run that would learn nothing. Records are looked at until one trains; images are not decoded.

        Args:
            records: all records of a run, such as a `datasets.Dataset`.
            name: what the caller calls them, for the message.

        Raises:
            ValueError: no record has what this collator draws; the message says what would help.
        """
        number = 0
        for record in without_images(records):
            if self.can_learn(record):
                return
            number += 1
        if number:
            raise ValueError(
                f"Nothing can be learned from the {number} records of `{name}`. "
                f"{self.advice(without_images(records), named=first_encoded(records))}"
            )

    def advice(
        self, records: Iterable[Mapping[str, Any]], kind: str | None = None, named: Mapping[str, Any] | None = None
    ) -> str:
        """Why nothing is learned from records, what would help, and which record is the first.

        Args:
            records: records none of which trains.
            kind: the kind of region text that was drawn; all that may be drawn when None.
            named: the first record, where `records` come without what names it.
        """
        captions, regions, kinds = False, False, set()
        for record in records:
            named = record if named is None else named
            captions = captions or bool(captions_of(record))
            regions = regions or bool(record["regions"])
            kinds |= {other for other in REGION_TEXTS if regions_with(record, other)}
        wanted = " or ".join(f"`{name}`" for name in ((kind,) if kind else self.region_texts))
        causes = f"{f'No region has a {wanted}' if regions else 'There are no regions'} and " + (
            "image captions are not used" if captions else "no image has a caption"
        )
        ways = []
        if found := [other for other in REGION_TEXTS if other in kinds]:
            ways.append(f"`region_text` (`--region_text {' '.join(found)}`), which the regions have")
        if captions:
            ways.append(
                "`image_captions` (`--image_captions True`) or `whole_image_share` (`--whole_image_share 0.1`), for "
                "the captions"
            )
        if not ways:
            ways.append(f"records with the field {wanted} in their regions, or with `captions`")
        return f"{causes}. What would help: {'; '.join(ways)}. The first record: {record_name(named or {})}."

    def _whole_image(self, record: Mapping[str, Any]) -> dict[str, Any]:
        width, height = record["image"].size
        return {"box": [0, 0, width, height], "mask": None}

    def texts(self, records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        """Every text that a batch of these records may hold; images are not decoded."""
        for record in without_images(records):
            yield from self._region_texts(record)
            if self.image_captions or self.whole_image_share > 0:
                yield from captions_of(record)

    def text_lengths(self, records: Iterable[Mapping[str, Any]]) -> list[int]:
        """Characters of the longest region text (of the longest caption without any) that may be drawn of each
        record."""
        return [
            max(map(len, self._region_texts(record) or captions_of(record)), default=0)
            for record in without_images(records)
        ]

    def _region_texts(self, record: Mapping[str, Any]) -> list[str]:
        return [_region_text(region, kind) for kind in self.region_texts for region in regions_with(record, kind)]

    def _text_states(self, texts: list[list[Any]], captions: list[str | None]) -> dict[str, Tensor]:
        """`region_text_states` (B, R, D) and `text_states` (B, D) of the captions, zeros where there is no text."""
        slots = max(map(len, texts))
        data = {"region_text_states": self._states([[*row, *[None] * (slots - len(row))] for row in texts])}
        if self.image_captions:
            data["text_states"] = self._states([captions])[0]
        return data

    def _states(self, rows: Sequence[Sequence[str | None]]) -> Tensor:
        """(rows, columns, D): the cached states of a table of texts, zeros for None."""
        given = torch.tensor([[text is not None for text in row] for row in rows])
        found = self.text_cache.states([text for row in rows for text in row if text is not None])
        states = found.new_zeros(*given.shape, found.shape[-1])
        states[given] = found
        return states

    def _sample(
        self, record: Mapping[str, Any], kind: str, rng: np.random.Generator
    ) -> tuple[list[Any], list[Any], str | None]:
        usable, captions = regions_with(record, kind), captions_of(record)
        whole = rng.random() < self.whole_image_share or (not usable and self.whole_image_share > 0)
        whole = whole and bool(captions)
        caption = None  # none is needed, or there is none
        if captions and (self.image_captions or whole):
            caption = captions[rng.integers(len(captions))]
        count = self.regions_per_image - whole
        chosen = usable
        if len(usable) > count:
            chosen = [usable[index] for index in sorted(rng.choice(len(usable), count, replace=False))]
        regions, texts = list(chosen), [_region_text(region, kind) for region in chosen]
        if whole and caption is not None:
            regions.insert(0, self._whole_image(record))
            texts.insert(0, caption)
        return regions, texts, caption
