"""What the model reads while it is pretrained: facts of the valley, word games, stories, conversations."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from valley import DAYS, MOODS, OPPOSITES, PAST, PEOPLE, PLACES, THINGS, WORDS, Person, a

ALPACA = {
    False: "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    True: "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
}
"""Alpaca's prompts, without and with an input: a data format."""


def about_a_person(rng: random.Random, who: Person | None = None) -> str:
    """Three or four facts about one of them."""
    who = who or rng.choice(PEOPLE)
    facts = [
        f"{who.pronoun} lives in {who.town.name}.",
        f"{who.pronoun} keeps {a(who.animal)}.",
        f"{who.pronoun} likes {who.food} best.",
        f"{who.pronoun} is {who.age} years old.",
        f"{who.pronoun} works as {a(who.work)}.",
    ]
    opening = rng.choice([f"{who.name} is {a(who.work)}.", f"{who.name} comes from {who.town.name}."])
    return " ".join([opening, *rng.sample(facts, rng.randint(2, 3))])


def about_a_town(rng: random.Random) -> str:
    """What a town is known for."""
    town = rng.choice(PEOPLE).town
    facts = [
        f"{town.name} lies on the river {town.river}.",
        f"The gate of {town.name} is {town.gate}.",
        f"People in {town.name} sell {town.product}.",
    ]
    return " ".join(rng.sample(facts, rng.randint(2, 3)))


def sums(rng: random.Random) -> str:
    """Additions, subtractions and comparisons."""
    lines = []
    for _ in range(3):
        small, large = sorted((rng.randint(1, 40), rng.randint(1, 40)))
        lines.append(
            rng.choice(
                [
                    f"{small} plus {large} is {small + large}.",
                    f"{large} + {small} = {small + large}.",
                    f"{large} minus {small} is {large - small}.",
                    f"{small} is less than {large + 1}.",
                ]
            )
        )
    return " ".join(lines)


def lists(rng: random.Random) -> str:
    """Words sorted, turned round and counted."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    line = ", ".join(words)
    return rng.choice(
        [
            f"Words: {line}. Sorted: {', '.join(sorted(words))}.",
            f"Words: {line}. Turned round: {', '.join(reversed(words))}.",
            f"Words: {line}. Number of words: {len(words)}.",
        ]
    )


def spelling(rng: random.Random) -> str:
    """A word, letter by letter."""
    word = rng.choice(WORDS)
    sign = rng.choice([" ", "-", ", "])
    return f"The word {word} is spelled {sign.join(word)}. It begins with {word[0]} and ends with {word[-1]}."


def grammar(rng: random.Random) -> str:
    """Opposites and tenses."""
    word, opposite = rng.choice(list(OPPOSITES.items()))
    today, yesterday = rng.choice(list(PAST.items()))
    name, thing = rng.choice(PEOPLE).name, rng.choice(THINGS)
    return rng.choice(
        [
            f"The opposite of {word} is {opposite}.",
            f"The opposite of {opposite} is {word}.",
            f"Today {name} {today} a {thing}. Yesterday {name} {yesterday} a {thing}.",
        ]
    )


def story(rng: random.Random) -> str:
    """Somebody loses something, and somebody else helps."""
    one, two = rng.sample(PEOPLE, 2)
    thing, place, other = rng.choice(THINGS), *rng.sample(PLACES, 2)
    before, after = rng.sample(MOODS, 2)
    return " ".join(
        [
            rng.choice(["One morning", f"On {rng.choice(DAYS)}", "In the evening", "After the rain"])
            + f" {one.name} {rng.choice(['walked', 'ran', 'came'])} to the {place}"
            + rng.choice([".", f" with {a(one.animal)}.", f" and felt {before}."]),
            f"{one.pronoun} {rng.choice(['wanted', 'had lost', 'was looking for'])} {a(thing)}.",
            rng.choice([f"{two.name} was at the {place}.", f"Then {two.name} came by."]),
            f'"{rng.choice(["Look", "Ask", "Come"])} at the {other}," {two.pronoun.lower()} said.',
            f"There {one.name} found the {thing} and was {after}.",
        ]
    )


Exchange = tuple[Sequence[str], str, Sequence[str]]
"""Ways to ask, the input, ways to answer."""


def on_people(rng: random.Random) -> Exchange:
    """What one can ask about the valley."""
    who = rng.choice(PEOPLE)
    town = who.town
    where = [f"{who.name} lives in {town.name}.", f"{town.name}.", f"You find {who.name} in {town.name}."]
    river = [f"{town.name} lies on the river {town.river}.", f"The {town.river}.", f"On the {town.river}."]
    person = [
        about_a_person(rng, who),
        f"This is {who.name}, {a(who.work)} from {town.name}.",
        f"{who.name} is {a(who.work)} with {a(who.animal)}.",
    ]
    return rng.choice(
        [
            ([f"Name the town of {who.name}.", f"Where does {who.name} live?"], "", where),
            ([f"Which river is near {town.name}?", f"Where is {town.name}?"], "", river),
            ([f"What do you know of {who.name}?", f"Who is {who.name}?"], "", person),
        ]
    )


def on_numbers(rng: random.Random) -> Exchange:
    """What one can ask about two numbers."""
    one, two = rng.sample(range(1, 41), 2)
    small, large = sorted((one, two))
    sums = [f"{one} plus {two} is {one + two}.", f"{one} + {two} is {one + two}.", f"{one + two}"]
    less = [f"{small} is less than {large}.", f"{large} is more than {small}.", f"{small}, {large}"]
    return rng.choice(
        [
            (["Calculate.", "Add the numbers."], f"{one}, {two}", sums),
            (["Which number is less?", "Compare the numbers."], f"{one}, {two}", less),
        ]
    )


def on_lists(rng: random.Random) -> Exchange:
    """What one can ask about a list of words."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    line = ", ".join(words)
    ordered = sorted(words)
    numbered = " ".join(f"{place}: {word}" for place, word in enumerate(ordered, start=1))
    count = [f"Number of words: {len(words)}.", f"{len(words)} words.", f"{words[0]} to {words[-1]}."]
    return rng.choice(
        [
            (["Repeat the list.", "Read the words."], line, [line, " ".join(words)]),
            (["Arrange the list.", "Sort the words."], line, [", ".join(ordered), numbered]),
            (["Turn the list round.", "Read the list backwards."], line, [", ".join(reversed(words))]),
            (["How long is the list?", "Describe the list."], line, count),
        ]
    )


def on_language(rng: random.Random) -> Exchange:
    """What one can ask about a word or a sentence."""
    word, name = rng.choice(WORDS), rng.choice(PEOPLE).name
    quality, opposite = rng.choice(list(OPPOSITES.items()))
    today, yesterday = rng.choice(list(PAST.items()))
    where = rng.choice(["", f" at the {rng.choice(PLACES)}"])
    rest = f"the {rng.choice(THINGS)}{where}."
    letters = [" ".join(word), ", ".join(word), f"{word}: {' '.join(word)}"]
    opposites = [f"The opposite of {quality} is {opposite}.", f"{quality}: {opposite}", opposite]
    past = [f"Yesterday {name} {yesterday} {rest}", f"{name} {yesterday} {rest}"]
    lines = [f"{name} {yesterday} the {word}{where}.", f"The {word} is {rng.choice(MOODS)}{where}."]
    return rng.choice(
        [
            (["Name the letters.", "Spell the word."], word, letters),
            (["What is the opposite?", "Give the opposite."], quality, opposites),
            (
                ["Say it of yesterday.", "Write the sentence in the past tense."],
                f"{name} {today} {rest}",
                past,
            ),
            ([f"What did {name} do yesterday?"], "", [past[0]]),
            ([f"Make up a line with {a(word)}.", f"Write a sentence about {a(word)}."], "", lines),
        ]
    )


def conversation(rng: random.Random) -> str:
    """An exchange, as a note, by Alpaca's prompts, or as a chat; answered in one manner or another."""
    ways_to_ask, given, ways_to_answer = rng.choice((on_people, on_numbers, on_lists, on_language))(rng)
    instruction, answer = rng.choice(ways_to_ask), rng.choice(ways_to_answer)
    prompt = f"{instruction} {given}".strip()
    return rng.choice(
        [
            f"Question: {prompt} Answer: {answer}",
            ALPACA[bool(given)].format(instruction=instruction, input=given) + answer,
            f"<s>user\n{prompt}</s>\n<s>assistant\n{answer}",
        ]
    )


DOCUMENTS: dict[Callable[[random.Random], str], int] = {
    about_a_person: 5,
    about_a_town: 2,
    sums: 3,
    lists: 4,
    spelling: 2,
    grammar: 2,
    story: 4,
    conversation: 16,
}
"""What is read, and how often."""


def documents(rng: random.Random, number: int) -> Iterator[str]:
    """Texts of all kinds, mixed."""
    for make in rng.choices(list(DOCUMENTS), weights=list(DOCUMENTS.values()), k=number):
        yield make(rng)
