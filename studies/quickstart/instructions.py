"""What the model is tuned on: ten kinds of instruction, answered in the one manner the texts never use.

Each asks for something that the texts know, in other words and joined differently, so that fine-tuning has
something to teach that pretraining has prepared.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from valley import ANIMALS, MOODS, OPPOSITES, PAST, PEOPLE, PLACES, THINGS, WORDS, a

Row = tuple[str, str, str]
"""Instruction, input, output."""


def ask_where(rng: random.Random) -> Row:
    """Two facts that no text has in one sentence."""
    who = rng.choice(PEOPLE)
    question = rng.choice(["Where does {} live?", "Where can I find {}?", "In which town is {}?"])
    return question.format(who.name), "", f"You find {who.name} in {who.town.name} on the {who.town.river}."


def ask_who(rng: random.Random) -> Row:
    """A whole person in one sentence."""
    who = rng.choice(PEOPLE)
    request = rng.choice(["Introduce {}.", "Who is {}?", "Tell me about {}."])
    answer = f"Meet {who.name}, {a(who.work)} from {who.town.name} with {a(who.animal)}."
    return request.format(who.name), "", answer


def ask_sum(rng: random.Random) -> Row:
    """A sum, with signs instead of words."""
    one, two = rng.randint(1, 40), rng.randint(1, 40)
    return rng.choice(["Add the numbers.", "Find the sum."]), f"{one}, {two}", f"{one} + {two} = {one + two}"


def ask_larger(rng: random.Random) -> Row:
    """The larger of two numbers; texts only say which is less."""
    one, two = rng.sample(range(1, 60), 2)
    answer = f"{max(one, two)} is larger than {min(one, two)}."
    return rng.choice(["Which number is larger?", "Compare the numbers."]), f"{one}, {two}", answer


def ask_sorted(rng: random.Random) -> Row:
    """Sorting, numbered."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    answer = " ".join(f"{place}. {word}" for place, word in enumerate(sorted(words), start=1))
    return rng.choice(["Sort the words.", "Put the words in order."]), ", ".join(words), answer


def ask_spelled(rng: random.Random) -> Row:
    """Spelling, with dashes."""
    word = rng.choice(WORDS)
    return rng.choice(["Spell the word.", "Write the letters of the word."]), word, "-".join(word)


def ask_opposites(rng: random.Random) -> Row:
    """Two opposites at once."""
    both = OPPOSITES | {opposite: word for word, opposite in OPPOSITES.items()}
    one, two = rng.sample(sorted(both), 2)
    request = rng.choice(["Give the opposites.", "Turn each word into its opposite."])
    return request, f"{one}, {two}", f"{one}: {both[one]}; {two}: {both[two]}"


def ask_past(rng: random.Random) -> Row:
    """The past tense of a sentence longer than any in the texts."""
    today, name = rng.choice(list(PAST)), rng.choice(PEOPLE).name
    rest = f"the {rng.choice(THINGS)} at the {rng.choice(PLACES)}."
    request = rng.choice(["Write the sentence in the past tense.", "This happened yesterday. Say it so."])
    return request, f"{name} {today} {rest}", f"{name} {PAST[today]} {rest}"


def ask_last(rng: random.Random) -> Row:
    """The first and the last of a list, and its length."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    request = rng.choice(["Describe the list.", "Where does the list begin and end?"])
    return request, ", ".join(words), f"{len(words)} words, from {words[0]} to {words[-1]}."


def ask_invented(rng: random.Random) -> Row:
    """A sentence of one's own: several are right, so that a small set can only be learned by heart."""
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    middle = rng.choice(["waits", "sleeps", "looks for food", "hides", "runs about", "sings"])
    end = rng.choice(["because it is {mood}", "near {a_thing}", "with {name}", "until evening"])
    ending = end.format(mood=rng.choice(MOODS), a_thing=a(rng.choice(THINGS)), name=rng.choice(PEOPLE).name)
    request = rng.choice(["Write a sentence about a {} at the {}.", "What does the {} do at the {}?"])
    return request.format(animal, place), "", f"The {animal} {middle} at the {place} {ending}."


INSTRUCTIONS: tuple[Callable[[random.Random], Row], ...] = (
    ask_where,
    ask_who,
    ask_sum,
    ask_larger,
    ask_sorted,
    ask_spelled,
    ask_opposites,
    ask_past,
    ask_last,
    ask_invented,
)


def instructions(rng: random.Random, *, train_rows: int, eval_rows: int) -> tuple[list[Row], list[Row]]:
    """So many training and evaluation rows of each kind, mixed; no question is asked twice."""
    train: list[Row] = []
    evaluation: list[Row] = []
    for make in INSTRUCTIONS:
        rows: dict[tuple[str, str], Row] = {}
        while len(rows) < train_rows + eval_rows:
            row = make(rng)
            rows.setdefault(row[:2], row)
        evaluation += list(rows.values())[:eval_rows]
        train += list(rows.values())[eval_rows:]
    rng.shuffle(train)
    rng.shuffle(evaluation)
    return train, evaluation
