"""Checks of generated captions: what passes, and every reason not to."""

import pytest

from pixclip_hf.annotation.longgrit.text_checks import (
    LANGUAGES,
    TextRules,
    find_echo,
    guess_language,
    is_refusal,
    repeats_itself,
)
from pixclip_hf.scenes.dataset import make_scene

SENTENCES = {
    "en": "A small brown dog with a white chest lies on a red blanket next to the window and looks at the camera.",
    "de": "Ein kleiner brauner Hund mit weißer Brust liegt auf einer roten Decke neben dem Fenster und sieht zu uns.",
    "fr": "Un petit chien brun à la poitrine blanche est couché sur une couverture rouge près de la fenêtre.",
    "es": "Un pequeño perro marrón con el pecho blanco está tumbado sobre una manta roja junto a la ventana.",
    "it": "Un piccolo cane marrone con il petto bianco è sdraiato su una coperta rossa accanto alla finestra.",
    "nl": "Een kleine bruine hond met een witte borst ligt op een rode deken naast het raam en kijkt naar ons.",
    "pt": "Um pequeno cão castanho com o peito branco está deitado sobre um cobertor vermelho ao lado da janela.",
}


def test_every_language_is_told_from_the_others():
    assert set(SENTENCES) == set(LANGUAGES)
    assert {language: guess_language(text) for language, text in SENTENCES.items()} == {
        language: language for language in LANGUAGES
    }
    assert guess_language("一只棕色的小狗躺在窗边的红色毯子上") is None
    assert guess_language("dog, brown, white chest, red blanket, window") is None
    assert guess_language("") is None


@pytest.mark.parametrize(
    "text",
    ["I'm sorry, but I can't help with that.", "I’m sorry", "As an AI, I see", "I cannot see the image.",
     "No image was provided", "I am unable to tell", "Please provide the image."],
)  # fmt: skip
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "A sign that says sorry.",
        "The dog cannot reach the ball.",
        "A card that reads: I am here",
        "A painting of an aid",
    ],
)
def test_no_refusals(text):
    assert not is_refusal(text)


def test_echoes():
    prompt = "Describe this object in one to three sentences, and leave out where it is."
    assert find_echo("Here you go. describe THIS object in one to three sentences!", [prompt])
    assert not find_echo("This object, in one to three colours, is a box.", [prompt])
    assert find_echo("The dog in the bounding box is brown.", [])
    assert find_echo("The dog marked by a red rectangle.", [])
    assert not find_echo("A red box of matches on a table marked by age.", [])


def test_repetition():
    assert repeats_itself("a red star is here and " * 5)
    assert not repeats_itself(" ".join(SENTENCES.values())) and not repeats_itself("a red star")


def test_rules_and_their_reasons():
    rules = TextRules(min_words=10, max_words=40, prompts=(SENTENCES["en"].upper(),))
    good = "The chair in the middle of the room is made of wood and has a soft seat that is worn at the edges."
    assert rules.find_problem(good) is None
    reasons = {
        "I am sorry, " + good: "refusal",
        "Well: " + SENTENCES["en"]: "echo of the prompt",
        "The chair is made of wood.": "fewer than 10 words",
        f"{good} {good}": "more than 40 words",
        "It is on the table. " * 5: "repeats itself",
        SENTENCES["fr"]: "not English",
    }
    assert {text: rules.find_problem(text) for text in reasons} == reasons


def test_long_captions_of_scenes_pass():
    rules = TextRules()
    texts = [region["long_caption"] for i in range(40) for region in make_scene(i, "train", 0)["regions"]]
    assert len(texts) > 100 and not any(map(rules.find_problem, texts))


def test_arguments():
    with pytest.raises(ValueError, match="`min_words` must lie between 1 and `max_words`, got 5 and 4"):
        TextRules(5, 4)
    with pytest.raises(ValueError, match="`language` must be one of en, de, .*, got 'xx'"):
        TextRules(language="xx")
