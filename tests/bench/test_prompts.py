"""Prompts of things, colours, numbers and places: written and parsed."""

import pytest

from v2flow_cli.bench.prompts import (
    KINDS,
    Prompt,
    Thing,
    make_prompts,
    parse_prompts,
    phrase_of,
    plural,
    prompt_for,
    with_article,
    without_colour,
)

NOUNS = {"fox", "apple", "house", "tree", "cherry", "box", "hot dog", "juice", "glasses", "egg"}


def read(text):
    [prompt] = parse_prompts([text], NOUNS)
    return prompt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", Prompt("a fox", "object", (Thing("fox"),))),
        ("fox", Prompt("fox", "object", (Thing("fox"),))),
        ("Draw a FOX!", Prompt("Draw a FOX!", "object", (Thing("fox"),))),
        ("a drawing of an egg", Prompt("a drawing of an egg", "object", (Thing("egg"),))),
        ("a small house", Prompt("a small house", "object", (Thing("house"),))),
        ("a hot dog", Prompt("a hot dog", "object", (Thing("hot dog"),))),
        ("a red apple", Prompt("a red apple", "colour", (Thing("apple", "red"),))),
        ("a gray fox", Prompt("a gray fox", "colour", (Thing("fox", "grey"),))),
        (
            "a blue fox on a green background",
            Prompt("a blue fox on a green background", "colour", (Thing("fox", "blue"),)),
        ),
        ("two foxes", Prompt("two foxes", "count", (Thing("fox"),), 2)),
        ("three red cherries", Prompt("three red cherries", "count", (Thing("cherry", "red"),), 3)),
        (
            "a house to the left of a green tree",
            Prompt(
                "a house to the left of a green tree",
                "relation",
                (Thing("house"), Thing("tree", "green")),
                1,
                "left of",
            ),
        ),
        (
            "an apple above a box",
            Prompt("an apple above a box", "relation", (Thing("apple"), Thing("box")), 1, "above"),
        ),
        ("a unicorn", Prompt("a unicorn", "other")),
        ("two unicorns", Prompt("two unicorns", "other")),
        ("a fox above a unicorn", Prompt("a fox above a unicorn", "other")),
    ],
)
def test_sentences_are_read(text, expected):
    assert read(text) == expected


def test_equal_lines_are_read_once_and_blank_lines_are_skipped():
    assert [p.text for p in parse_prompts(["a  fox", "", "a fox", "fox"], NOUNS)] == ["a fox", "fox"]


def test_generated_prompts_parse_to_their_content():
    names = {noun: {"red", "blue"} for noun in NOUNS}
    prompts = make_prompts(names, 6, seed=3)
    assert {prompt.kind for prompt in prompts} == set(KINDS)
    assert parse_prompts([prompt.text for prompt in prompts], NOUNS) == prompts
    assert make_prompts(names, 6, seed=3) == prompts != make_prompts(names, 6, seed=4)
    assert max(sum(p.kind == kind for p in prompts) for kind in KINDS) <= 6
    assert not [p for p in prompts if p.kind == "count" and p.things[0].noun == "glasses"]  # it has no other plural


def test_few_titles_give_few_prompts():
    assert [p.kind for p in make_prompts({"fox": set()}, 5, seed=0)] == ["object", "count"]


@pytest.mark.parametrize(
    ("kind", "things", "more", "text"),
    [
        ("object", [Thing("egg")], {}, "an egg"),
        ("colour", [Thing("fox", "orange")], {}, "an orange fox"),
        ("count", [Thing("box")], {"count": 3}, "three boxes"),
        ("relation", [Thing("fox"), Thing("glasses")], {"relation": "below"}, "a fox below glasses"),
    ],
)
def test_colour_words_and_noun_phrases(kind, things, more, text):
    assert prompt_for(kind, things, **more).text == text


def test_articles_plurals_and_captions():
    assert [with_article(n) for n in ("apple", "fox", "glasses", "bread", "bus", "the end", "chair")] == [
        "an apple",
        "a fox",
        "glasses",
        "bread",
        "a bus",
        "the end",
        "a chair",
    ]
    assert [plural(n) for n in ("fox", "cherry", "boy", "glasses", "glass of milk", "beach")] == [
        "foxes",
        "cherries",
        "boys",
        "glasses",
        "glasses of milk",
        "beaches",
    ]
    assert [phrase_of(t) for t in ("A drawing of a red apple.", "draw a fox", "two cats")] == [
        "red apple",
        "fox",
        "two cats",
    ]
    assert (without_colour("red apple"), without_colour("orange"), without_colour("red")) == ("apple", "orange", "red")
