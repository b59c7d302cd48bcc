"""The seven kinds of questions, each as a draw from the world: one function makes training text and test items alike.

Every function returns the columns of the real data set of that name, so that the stock prompt wording applies, or
`None` when the draw belongs to the other side of the split. `test` says which side is wanted: what a test item is
about (an entity and a relation in this format, a pair of names, a person and an activity) is held out by hash, so that
the same question can never be both. Test items are about the obscure newcomers, what the model knows least. Choices
come from one pool per relation, gold and distractors alike: no position, length or frequency gives the gold away.
"""

import random
from collections.abc import Sequence

from harness.microworld import words
from harness.microworld.wordings import (
    KIND_STATEMENTS,
    PERSON_POLAR,
    PERSON_QUESTIONS,
    PERSON_STATEMENTS,
    THING_HINTS,
    THING_OWNERSHIP,
    TWO_HOP_QUESTIONS,
    TWO_HOP_STATEMENTS,
    say,
    say_kind,
    stem,
)
from harness.microworld.world import (
    KIND_RELATIONS,
    PERSON_RELATIONS,
    TWO_HOPS,
    Person,
    World,
    build,
    held_out,
)

LETTERS = ("A", "B", "C", "D")


def draw_person(world: World, rng: random.Random, obscure: bool = False) -> Person:
    """A person by frequency weight, or any of the obscure ones (test items)."""
    if obscure:
        return rng.choice(world.obscure_people)
    return rng.choices(world.people, cum_weights=world.people_weights)[0]


def draw_kind(world: World, rng: random.Random, obscure: bool = False) -> tuple[str, str]:
    """A (kind, entity) by frequency weight, or any of the obscure goods (test items)."""
    if obscure:
        return "thing", rng.choice(world.obscure_goods)
    return rng.choices(world.kind_entities, cum_weights=world.kind_weights)[0]


def _choices(rng: random.Random, gold: str, pool: Sequence[str]) -> tuple[list[str], int]:
    options = [gold, *rng.sample([value for value in pool if value != gold], 3)]
    rng.shuffle(options)
    return options, options.index(gold)


def _other(rng: random.Random, value: str, pool: Sequence[str]) -> str:
    return rng.choice([candidate for candidate in pool if candidate != value])


def arc_easy(world: World, rng: random.Random, test: bool) -> dict | None:
    """One hop: a relation of a person. Held out: (person, relation) in question form."""
    person, relation = draw_person(world, rng, test), rng.choice(list(PERSON_RELATIONS))
    if held_out("arc_easy", person.name, relation, share=0.12) != test:
        return None
    question = rng.choice(PERSON_QUESTIONS[relation]).format(s=person.name)
    options, gold = _choices(rng, person.facts[relation], PERSON_RELATIONS[relation])
    return {
        "question": question,
        "choices": {"text": options, "label": list(LETTERS)},
        "answerKey": LETTERS[gold],
    }


def arc_challenge(world: World, rng: random.Random, test: bool) -> dict | None:
    """Two hops: a relation of the kind that a relation of a person leads to. Held out: the person, in two-hop text."""
    person, chain = draw_person(world, rng, test), rng.choice(TWO_HOPS)
    if held_out("two_hop", person.name, share=0.2) != test:
        return None
    question = rng.choice(TWO_HOP_QUESTIONS[chain]).format(s=person.name)
    pool = KIND_RELATIONS[chain[0]][chain[1]]
    options, gold = _choices(rng, world.two_hop(person, chain), pool)
    return {
        "question": question,
        "choices": {"text": options, "label": list(LETTERS)},
        "answerKey": LETTERS[gold],
    }


def openbookqa(world: World, rng: random.Random, test: bool) -> dict | None:
    """An unfinished sentence about a kind. Held out: (entity, relation) in this wording."""
    kind, entity = draw_kind(world, rng, test)
    relation = rng.choice(list(KIND_RELATIONS[kind]))
    if held_out("openbookqa", entity, relation, share=0.65) != test:
        return None
    options, gold = _choices(rng, world.kinds[kind][entity][relation], KIND_RELATIONS[kind][relation])
    return {
        "question_stem": stem(relation, entity),
        "choices": {"text": options, "label": list(LETTERS)},
        "answerKey": LETTERS[gold],
    }


def boolq(world: World, rng: random.Random, test: bool) -> dict | None:
    """Yes or no, supported by a passage about one or two people. Held out: (person, relation, value) asked."""
    people = [draw_person(world, rng, test) for _ in range(rng.choice((1, 2)))]
    if len({person.name for person in people}) < len(people):
        return None
    asked = rng.choice(people)
    relations = rng.sample(list(PERSON_RELATIONS), rng.choice((2, 3)))
    relation, label = rng.choice(relations), rng.randrange(2)
    true_value = asked.facts[relation]
    value = true_value if label else _other(rng, true_value, PERSON_RELATIONS[relation])
    if held_out("boolq", asked.name, relation, share=0.12) != test:
        return None
    sentences = [
        say(rng.choice(PERSON_STATEMENTS[each]), person.name, person.facts[each])
        for person in people
        for each in relations
    ]
    title = people[0].name if len(people) == 1 else " and ".join(person.name for person in people)
    return {
        "question": say(PERSON_POLAR[relation], asked.name, value),
        "passage": f"{title} -- {' '.join(sentences)}",
        "label": label,
    }


def rte(world: World, rng: random.Random, test: bool) -> dict | None:
    """Does a statement follow from another: by other words, or by a fact about a kind or a thing?

    Held out: (person, relation) in this format, and people held out of two-hop text wherever a second fact is needed.
    """
    person, label = draw_person(world, rng, test), rng.randrange(2)  # 0 = entailment, 1 = not
    way = rng.choice(("other words", "kind", "thing"))
    if way == "other words":
        relation = rng.choice(list(PERSON_RELATIONS))
        pool, known = PERSON_RELATIONS[relation], person.facts[relation]
        gold, (wording, hypothesis) = known, rng.sample(PERSON_STATEMENTS[relation], 2)
    elif way == "kind":
        relation, of_kind = rng.choice(TWO_HOPS)
        pool, known = KIND_RELATIONS[relation][of_kind], person.facts[relation]
        gold = world.two_hop(person, (relation, of_kind))
        wording, hypothesis = rng.choice(PERSON_STATEMENTS[relation]), TWO_HOP_STATEMENTS[relation, of_kind]
    else:
        goods = list(world.kinds["thing"])
        relation, known = "thing", rng.choice(world.obscure_goods if test else goods)
        of_kind = rng.choice(list(THING_HINTS))
        pool, gold = KIND_RELATIONS["thing"][of_kind], world.kinds["thing"][known][of_kind]
        wording, hypothesis = rng.choice(THING_OWNERSHIP), THING_HINTS[of_kind]
    if held_out("rte", person.name, relation, share=0.12) != test:
        return None
    if way == "kind" and held_out("two_hop", person.name, share=0.2):
        return None
    return {
        "sentence1": say(wording, person.name, known),
        "sentence2": say(hypothesis, person.name, _other(rng, gold, pool) if label else gold),
        "label": label,
    }


def draw_routine(world: World, rng: random.Random, uniform: bool = False) -> str:
    """The name of a routine by frequency weight, or uniformly."""
    names = list(world.routines)
    return rng.choice(names) if uniform else rng.choices(names, cum_weights=world.routine_weights)[0]


def hellaswag(world: World, rng: random.Random, test: bool) -> dict | None:
    """The next step of a routine. Held out: (last name, routine)."""
    person = draw_person(world, rng, test)
    routine = rng.choice(world.obscure_routines) if test else draw_routine(world, rng)
    if held_out("hellaswag", person.last, routine, share=0.12) != test:
        return None
    steps = world.routines[routine]
    position = rng.randrange(1, len(steps) - 1)
    gold = steps[position]
    rivals = {rng.choice([step for step in steps[1:] if step != gold])}  # one from the same routine
    while len(rivals) < 3:
        rivals.add(rng.choice(world.routines[draw_routine(world, rng, True)][1:]))
        rivals.discard(gold)
    endings = [gold, *sorted(rivals)]
    rng.shuffle(endings)
    told = told_steps(person, steps[:position])
    return {
        "activity_label": routine,
        "ctx_a": " ".join(told),
        "ctx_b": person.pronoun.lower(),
        "ctx": " ".join([*told, person.pronoun]),
        "endings": [f"{ending}." for ending in endings],
        "label": str(endings.index(gold)),
    }


def told_steps(person: Person, steps: Sequence[str]) -> list[str]:
    """One sentence per step, the name first, then the pronoun."""
    return [f"{person.pronoun if told else person.name} {step}." for told, step in enumerate(steps)]


def winogrande(world: World, rng: random.Random, test: bool) -> dict | None:
    """Who is meant, by the sense of the reason or by a mood that goes with (quarrel, thing) in this world?

    Held out: the pair of first names.
    """
    first, second = rng.sample(words.WOMEN + words.MEN, 2)
    if held_out("winogrande", *sorted((first, second)), share=0.15) != test:
        return None
    quarrel, thing = rng.randrange(len(words.QUARRELS)), rng.choice(words.THINGS)
    frame, for_first, for_second = words.QUARRELS[quarrel]
    if rng.random() < 0.5:
        moods = world.moods[quarrel, thing]
        for_first, for_second = moods[:2], moods[2:]
    about_second, swapped = rng.randrange(2), rng.randrange(2)
    reason = rng.choice(for_second if about_second else for_first)
    options = (second, first) if swapped else (first, second)
    return {
        "sentence": f"{frame.format(a=first, b=second, t=thing)} _ {reason}.",
        "option1": options[0],
        "option2": options[1],
        "answer": str((about_second ^ swapped) + 1),
    }


QUESTIONS = {
    "boolq": boolq,
    "rte": rte,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc_easy,
    "arc_challenge": arc_challenge,
    "openbookqa": openbookqa,
}


def training_draw(task: str, world: World, rng: random.Random) -> dict:
    """One row of `task` from the training side of the split."""
    while (row := QUESTIONS[task](world, rng, False)) is None:
        pass
    return row


def as_prompt_and_answer(task: str, row: dict) -> tuple[str, str]:
    """The row in the stock prompt wording of lm-eval, and its gold continuation without the leading blank."""
    if task == "boolq":
        return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes")[row["label"]]
    if task == "rte":
        return f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:", ("True", "False")[
            row["label"]
        ]
    if task == "hellaswag":
        return f"{row['activity_label']}: {row['ctx']}", row["endings"][int(row["label"])]
    if task == "winogrande":
        before, after = row["sentence"].split("_")
        return before + row["option" + row["answer"]], after.strip()
    gold = row["choices"]["text"][LETTERS.index(row["answerKey"])]
    if task == "openbookqa":
        return row["question_stem"], gold
    return f"Question: {row['question']}\nAnswer:", gold


def kind_sentence(world: World, rng: random.Random, obscure: bool = False) -> str:
    """A statement about a kind; the wording of unfinished sentences only where they are not held out."""
    kind, entity = draw_kind(world, rng, obscure)
    relation = rng.choice(list(KIND_RELATIONS[kind]))
    wordings = KIND_STATEMENTS[relation]
    if held_out("openbookqa", entity, relation, share=0.65):
        wordings = wordings[1:]
    return say_kind(rng.choice(wordings), entity, world.kinds[kind][entity][relation])


def _asks(task: str, row: dict) -> str:
    """What an item asks, without its choices: two items that ask the same are the same item."""
    prompt, _ = as_prompt_and_answer(task, row)
    return prompt.split("\n", 1)[1] if task in ("boolq", "rte") else prompt


def distinct_items(task: str, count: int) -> list[dict]:
    """Up to `count` test items that ask different things, numbered in `idx`; fewer where the world has no more."""
    world, rng = build(), random.Random(f"test-{task}")
    items: dict[str, dict] = {}
    for _ in range(400 * count):
        if len(items) == count:
            break
        if (row := QUESTIONS[task](world, rng, True)) is not None:
            items.setdefault(_asks(task, row), row)
    return [{"idx": number, **row} for number, row in enumerate(items.values())]
