"""Boxes for the candidate texts of an image: OWLv2 through transformers, or a simulated detector of known error."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import List, Value
from PIL import Image
from torch import Tensor

from ...images import open_image
from ...pipelines.region_detection import class_nms
from ..stages import (
    Batch,
    RowStage,
    add_counts,
    add_step,
    check_at_least_one,
    load_model,
    reject,
    row_generator,
)
from .phrases import STOP_WORDS

DETECTIONS = List({"candidate": Value("int32"), "box": List(Value("float32"), length=4), "score": Value("float32")})
# Scores and boxes are rounded: the sums of a matrix product differ in their last bits with the size of the batch.
_SCORE_DIGITS, _BOX_DIGITS = 3, 1


@dataclass(frozen=True)
class BoxRules:
    """Which of a detector's boxes stay.

    Attributes:
        threshold: least score.
        top_k: boxes of one phrase.
        nms_iou: a box that overlaps a better one of its phrase by more than this IoU goes.
        min_area: least share of the image.
    """

    threshold: float = 0.1
    top_k: int = 3
    nms_iou: float = 0.5
    min_area: float = 0.001

    def __post_init__(self) -> None:
        for name in ("threshold", "nms_iou", "min_area"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        check_at_least_one(self, "top_k")

    def select(
        self,
        labels: Sequence[int] | np.ndarray,
        boxes: np.ndarray,
        scores: Sequence[float] | np.ndarray,
        width: int,
        height: int,
    ) -> tuple[list[dict[str, Any]], Counter]:
        """The detections that stay, best first, and how many went, by reason.

        Args:
            labels: index of the candidate of each box.
            boxes: (N, 4) xyxy in pixels; clipped to the image.
            scores: the scores of the boxes.
            width, height: the sides of the image.
        """
        counts = Counter({"boxes": len(labels)})
        boxes = np.clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4), 0, [width, height, width, height])
        boxes = boxes.round(_BOX_DIGITS)
        by_phrase = defaultdict(list)
        for i, (label, score) in enumerate(zip(labels, scores, strict=True)):
            x0, y0, x1, y1 = boxes[i]
            if score < self.threshold:
                counts["dropped: below the threshold"] += 1
            elif x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < self.min_area * width * height:
                counts["dropped: too small"] += 1
            else:
                by_phrase[label].append((-round(float(score), _SCORE_DIGITS), *boxes[i].tolist()))
        kept: list[dict[str, Any]] = []
        for label, rows in by_phrase.items():
            table = torch.tensor(sorted(rows), dtype=torch.float64)
            # All of them: a rounded score may lie below the threshold that the score itself has passed.
            best = class_nms(table[:, 1:], -table[:, 0], float("-inf"), self.nms_iou)
            counts["dropped: overlaps a better box of its phrase"] += len(rows) - len(best)
            counts["dropped: beyond the top boxes of its phrase"] += max(len(best) - self.top_k, 0)
            for i in best[: self.top_k]:
                kept.append({"candidate": int(label), "box": table[i, 1:].tolist(), "score": -float(table[i, 0])})
        kept.sort(key=lambda found: (-found["score"], found["candidate"], found["box"]))
        counts["kept"] = len(kept)
        return kept, counts


def _finish(batch: Batch, row: int, stage: str, model: str, found: list[dict[str, Any]], counts: Counter) -> None:
    with_box = {detection["candidate"] for detection in found}
    counts["candidates without a box"] = len(batch["vesl_candidates"][row]) - len(with_box)
    batch["vesl_detections"][row] = found
    add_counts(batch, row, stage, counts)
    add_step(batch, row, stage, model)
    if not found:
        reject(batch, row, stage, "no box left")


@dataclass
class OpenVocabularyDetector(RowStage):
    """OWLv2: every box goes to the candidate that it likes best (VESL, arXiv 2410.02746, section 4).

    Args:
        model: folder or Hub id of an OWLv2 detector.
        rules: which boxes stay.
        template: what the text tower reads of a candidate.
        batch_size: images per call, with all their candidates.
    """

    model: str
    rules: BoxRules = BoxRules()
    template: str = "a photo of {}"
    batch_size: int = field(default=8, repr=False, kw_only=True)

    name: ClassVar[str] = "detection"
    columns: ClassVar[Mapping[str, Any]] = {"vesl_detections": DETECTIONS}
    num_gpus: ClassVar[float] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.template:
            raise ValueError(f"`template` must hold {{}} for the candidate, got {self.template!r}.")

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        images = [open_image(batch["image"][row]) for row in rows]
        texts = [[candidate["text"] for candidate in batch["vesl_candidates"][row]] for row in rows]
        for row, image, result in zip(rows, images, self._detect(images, texts), strict=True):
            labels, boxes, scores = (result[name].float().cpu().numpy() for name in ("labels", "boxes", "scores"))
            found, counts = self.rules.select(labels.astype(int), boxes, scores, *image.size)
            _finish(batch, row, self.name, self.model, found, counts)

    @torch.inference_mode()
    def _detect(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[dict[str, Tensor]]:
        """For each image the `boxes` above the threshold, xyxy in pixels, with their `scores` and `labels`."""
        model, processor = self._loaded
        most = max(len(phrases) for phrases in texts)
        tokenizer = processor.tokenizer
        length = model.config.text_config.max_position_embeddings
        # A query whose first token is 0 counts as padding; the processor's own padding is a text and could win.
        ids = torch.zeros(len(texts), most, length, dtype=torch.long)
        attended = torch.ones_like(ids)
        for i, phrases in enumerate(texts):
            prompts = [self.template.format(phrase) for phrase in phrases]
            encoded = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            ids[i, : len(phrases)], attended[i, : len(phrases)] = encoded["input_ids"], encoded["attention_mask"]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        outputs = model(
            input_ids=ids.flatten(0, 1).to(model.device),
            attention_mask=attended.flatten(0, 1).to(model.device),
            pixel_values=pixels.to(model.device, model.dtype),
        )
        sizes = [(image.height, image.width) for image in images]
        return processor.image_processor.post_process_object_detection(
            outputs, threshold=self.rules.threshold, target_sizes=sizes
        )

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        model = load_model(AutoModelForZeroShotObjectDetection, self.model)
        if model.config.model_type not in ("owlv2", "owlvit"):
            raise ValueError(f"`model` must be an OWLv2 detector, got {self.model!r}: {model.config.model_type}.")
        return model, AutoProcessor.from_pretrained(self.model)


def _words(*texts: str | None) -> set[str]:
    found = re.findall(r"[^\W_]+", " ".join(text for text in texts if text).lower())
    return {word for word in found if word not in STOP_WORDS}


@dataclass
class SimulatedDetector(RowStage):
    """A stand-in that finds the source's own regions, with errors of known size; for sources with captions or
    categories of their regions, such as scenes.

    It proposes a box for each region, except those that it misses. How well a candidate suits a region is the share of
    the candidate's words that the region's texts hold, times (1 + the share of their words that the candidate holds)
    / 2, plus noise. As with OWLv2 every box goes to the candidate that suits it best.

    Args:
        rules: which boxes stay.
        miss_rate: share of the regions without a proposal.
        false_rate: images with one more box, of a random place, size, candidate and score above the threshold.
        box_noise: standard deviation of each edge, as a share of the box's side.
        score_noise: standard deviation of what is added to a score.
        seed: the seed of all draws.
        batch_size: images per call.
    """

    rules: BoxRules = BoxRules(threshold=0.3)
    miss_rate: float = 0.1
    false_rate: float = 0.1
    box_noise: float = 0.03
    score_noise: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "detection"
    columns: ClassVar[Mapping[str, Any]] = {"vesl_detections": DETECTIONS}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("miss_rate", "false_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("box_noise", "score_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row in rows:
            draw = row_generator(self.seed, self.name, batch["record_id"][row])
            width, height = batch["width"][row], batch["height"][row]
            candidates = [_words(candidate["text"]) for candidate in batch["vesl_candidates"][row]]
            labels, boxes, scores = [], [], []
            for region in batch["regions"][row]:
                missed, noise = draw.random() < self.miss_rate, draw.normal(size=4)
                jitter = draw.normal(size=len(candidates)) * self.score_noise
                if missed:
                    continue
                x0, y0, x1, y1 = region["box"]
                words = _words(region["category"], region["caption"])
                suits = np.array([_fit(candidate, words) for candidate in candidates])
                # Noise makes no text out of nothing: what shares no word stays at zero.
                suits = np.where(suits > 0, np.clip(suits + jitter, 0, 1), 0)
                labels.append(int(suits.argmax()))
                scores.append(float(suits.max()))
                sides = np.array([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
                boxes.append(np.array([x0, y0, x1, y1]) + noise * self.box_noise * sides)
            if draw.random() < self.false_rate:
                (x0, x1), (y0, y1) = np.sort(draw.random((2, 2)), axis=1) * [[width], [height]]
                boxes.append(np.array([x0, y0, x1, y1]))
                labels.append(int(draw.integers(len(candidates))))
                scores.append(float(draw.uniform(self.rules.threshold, 1)))
            found, counts = self.rules.select(labels, np.array(boxes), scores, width, height)
            _finish(batch, row, self.name, "stand-in: simulated detector", found, counts)


def _fit(candidate: set[str], region: set[str]) -> float:
    shared = len(candidate & region)
    return shared / len(candidate) * (1 + shared / len(region)) / 2 if shared else 0.0
