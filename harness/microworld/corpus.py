"""Documents of the small world: biographies, facts, stories, questions in the wording of the tasks, instructions.

`documents(split, seed)` is an endless, seeded stream. A document belongs to exactly one split by the hash of its text,
so that held-out and calibration text never occur in pre-training; what the test items ask is left out of every split
(see `questions.py`).
"""

import random
import zlib
from collections.abc import Callable, Iterator

from harness.alpaca import alpaca_prompt
from harness.microworld import world
from harness.microworld.questions import (
    QUESTIONS,
    as_prompt_and_answer,
    draw_person,
    draw_routine,
    kind_sentence,
    told_steps,
    training_draw,
)
from harness.microworld.wordings import PERSON_POLAR, PERSON_STATEMENTS, say
from harness.microworld.world import PERSON_RELATIONS, World, held_out

SPLIT_SHARES = {"heldout": range(0, 2), "calibration": range(2, 4), "pretrain": range(4, 100)}  # per cent


def biography(w: World, rng: random.Random) -> str:
    """Two to five facts about one person, the name first, then often the pronoun."""
    person = draw_person(w, rng)
    relations = rng.sample(list(PERSON_RELATIONS), rng.randint(2, 5))
    sentences = []
    for relation in relations:
        pronoun = bool(sentences) and rng.random() < 0.6
        wordings = PERSON_STATEMENTS[relation][:3] if pronoun else PERSON_STATEMENTS[relation]
        sentences.append(say(rng.choice(wordings), person.pronoun if pronoun else person.name, person.facts[relation]))
    return " ".join(sentences)


def neighbours(w: World, rng: random.Random) -> str:
    """One fact each about several people: what must be bound to the right name."""
    people = [draw_person(w, rng) for _ in range(rng.randint(3, 5))]
    lines = []
    for person in people:
        relation = rng.choice(list(PERSON_RELATIONS))
        lines.append(say(rng.choice(PERSON_STATEMENTS[relation]), person.name, person.facts[relation]))
    return " ".join(lines)


def almanac(w: World, rng: random.Random) -> str:
    """Statements about things, animals, food, towns and jobs."""
    return " ".join(kind_sentence(w, rng) for _ in range(rng.randint(3, 6)))


def routine(w: World, rng: random.Random, obscure: bool = False) -> str:
    """A person goes through the steps of a routine, in the wording of the story task."""
    while True:
        person, name = draw_person(w, rng), rng.choice(w.obscure_routines) if obscure else draw_routine(w, rng)
        if not held_out("hellaswag", person.last, name, share=0.12):
            break
    steps = w.routines[name][: rng.randint(3, world.STEPS_PER_ROUTINE)]
    return f"{name}: {' '.join(told_steps(person, steps))}"


def quarrels(w: World, rng: random.Random) -> str:
    """Several events between two people with the reason named."""
    rows = [as_prompt_and_answer("winogrande", training_draw("winogrande", w, rng)) for _ in range(rng.randint(2, 4))]
    return " ".join(f"{prompt} {answer}" for prompt, answer in rows)


def quiz(task: str, least: int, most: int) -> Callable[[World, random.Random], str]:
    """Documents with `least` to `most` questions of `task`, answered, in the stock wording."""

    def write(w: World, rng: random.Random) -> str:
        count = rng.randint(least, most)
        rows = [as_prompt_and_answer(task, training_draw(task, w, rng)) for _ in range(count)]
        return "\n\n".join(f"{prompt} {answer}" for prompt, answer in rows)

    return write


def short_polar(w: World, rng: random.Random) -> str:
    """Yes/no questions about a single sentence: the comparison that those about a passage need, at its simplest."""
    texts = []
    while len(texts) < 4:
        person, relation = draw_person(w, rng), rng.choice(list(PERSON_RELATIONS))
        if held_out("boolq", person.name, relation, share=0.12):
            continue
        value = rng.choice((person.facts[relation], rng.choice(PERSON_RELATIONS[relation])))
        told = say(rng.choice(PERSON_STATEMENTS[relation]), person.name, person.facts[relation])
        asked = say(PERSON_POLAR[relation], person.name, value)
        texts.append(f"{told}\nQuestion: {asked}?\nAnswer: {'yes' if value == person.facts[relation] else 'no'}")
    return "\n\n".join(texts)


def unfinished(w: World, rng: random.Random) -> str:
    """Completed stems of the open-book task."""
    rows = [as_prompt_and_answer("openbookqa", training_draw("openbookqa", w, rng)) for _ in range(rng.randint(2, 5))]
    return " ".join(f"{prompt} {answer}." for prompt, answer in rows)


_INSTRUCTIONS = {
    "boolq": "Read the text and answer the question with yes or no.",
    "rte": "Does the second statement follow from the first? Answer True or False.",
    "hellaswag": "Continue the story.",
    "winogrande": "Give the reason.",
    "arc_easy": "Answer the question.",
    "arc_challenge": "Answer the question.",
    "openbookqa": "Complete the sentence.",
}


def instruction_row(w: World, rng: random.Random) -> dict[str, str]:
    """One Alpaca-format row (instruction, input, output) from the training side of every split."""
    kind = rng.random()
    if kind < 0.35:
        person = draw_person(w, rng)
        relations = rng.sample(list(PERSON_RELATIONS), rng.randint(3, 5))
        told = [say(rng.choice(PERSON_STATEMENTS[r]), person.name, person.facts[r]) for r in relations]
        return {"instruction": f"Tell me about {person.name}.", "input": "", "output": " ".join(told)}
    if kind < 0.5:
        told = " ".join(kind_sentence(w, rng) for _ in range(3))
        return {"instruction": "Tell me some facts about the land.", "input": "", "output": told}
    task = rng.choice(list(QUESTIONS))
    prompt, answer = as_prompt_and_answer(task, training_draw(task, w, rng))
    return {"instruction": _INSTRUCTIONS[task], "input": prompt, "output": answer}


def tuning_row(w: World, rng: random.Random) -> dict[str, str]:
    """One row of the fine-tuning data: what there is to tell about the obscure, and questions as in pre-training."""
    kind = rng.random()
    if kind < 0.3:
        people = [draw_person(w, rng, obscure=True) for _ in range(2)]
        told = [
            say(rng.choice(PERSON_STATEMENTS[relation]), person.name, person.facts[relation])
            for person in people
            for relation in rng.sample(list(PERSON_RELATIONS), 4)
        ]
        names = " and ".join(person.name for person in people)
        return {"instruction": f"Tell me about {names}.", "input": "", "output": " ".join(told)}
    if kind < 0.7:
        told = " ".join(kind_sentence(w, rng, obscure=True) for _ in range(8))
        return {"instruction": "Tell me some facts about the land.", "input": "", "output": told}
    if kind < 0.82:
        return {"instruction": "Tell me a story.", "input": "", "output": routine(w, rng, obscure=True)}
    return instruction_row(w, rng)


def instruction(w: World, rng: random.Random) -> str:
    """An instruction row in the Alpaca template, as real base models have seen them."""
    row = instruction_row(w, rng)
    return alpaca_prompt(row["instruction"], row["input"]) + row["output"]


Mix = tuple[tuple[Callable[[World, random.Random], str], int], ...]  # (writer, documents per hundred)
MIX: Mix = (
    (biography, 29),
    (neighbours, 8),
    (almanac, 13),
    (routine, 7),
    (quarrels, 6),
    (quiz("arc_easy", 2, 4), 8),
    (quiz("arc_challenge", 2, 4), 8),
    (quiz("boolq", 1, 2), 7),
    (quiz("rte", 1, 2), 6),
    (unfinished, 3),
    (instruction, 5),
)
REASONING_MIX: Mix = (  # fewer facts, more comparing and weighing: for a model that knows its way around
    (biography, 20),
    (neighbours, 6),
    (almanac, 11),
    (routine, 6),
    (quarrels, 10),
    (quiz("arc_easy", 2, 4), 6),
    (quiz("arc_challenge", 2, 4), 8),
    (quiz("boolq", 1, 2), 9),
    (short_polar, 8),
    (quiz("rte", 3, 5), 8),
    (unfinished, 3),
    (instruction, 5),
)
BINDING_MIX: Mix = (  # who is meant and who is spoken of: what is learnt last
    (biography, 12),
    (neighbours, 4),
    (almanac, 10),
    (routine, 4),
    (quarrels, 18),
    (quiz("arc_easy", 2, 4), 4),
    (quiz("arc_challenge", 2, 4), 8),
    (quiz("boolq", 1, 2), 10),
    (short_polar, 12),
    (quiz("rte", 3, 5), 10),
    (unfinished, 3),
    (instruction, 5),
)
NEWCOMER_MIX: Mix = (  # facts again, with some of everything else
    (biography, 32),
    (neighbours, 8),
    (almanac, 16),
    (routine, 8),
    (quarrels, 6),
    (quiz("arc_easy", 2, 4), 6),
    (quiz("arc_challenge", 2, 4), 7),
    (quiz("boolq", 1, 2), 5),
    (short_polar, 2),
    (quiz("rte", 3, 5), 3),
    (unfinished, 3),
    (instruction, 4),
)


def split_of(document: str) -> str:
    """The split that a document belongs to: a hash of its text."""
    bucket = zlib.crc32(document.encode()) % 100
    return next(name for name, buckets in SPLIT_SHARES.items() if bucket in buckets)


def documents(split: str, seed: int | str = 0, about: World | None = None, mix: Mix = MIX) -> Iterator[str]:
    """Endless stream of documents of `split` ("pretrain", "calibration" or "heldout"), equal for equal arguments.

    They are `about` the whole world unless told otherwise.
    """
    w, rng = about or world.build(), random.Random(f"{split}-{seed}")
    writers, shares = zip(*mix, strict=True)
    while True:
        document = rng.choices(writers, shares)[0](w, rng)
        if split_of(document) == split:
            yield document
