"""How facts are said: statements, questions, yes/no questions and unfinished sentences for every relation.

Statements come in several wordings; `{s}` is the subject (a name or a pronoun), `{v}` the value, with `{an}` where the
language wants an article. The first wording of a relation is the one that unfinished sentences (`STEMS`) cut short.
"""

PERSON_STATEMENTS = {
    "city": (
        "{s} lives in {v}.",
        "{s} has a house in {v}.",
        "{s} comes from {v}.",
        "The home of {s} is in {v}.",
    ),
    "job": ("{s} works as {an}.", "{s} is {an}.", "{s} makes a living as {an}.", "The job of {s} is {v}."),
    "pet": ("{s} keeps {an}.", "{s} owns {an}.", "{s} has {an} at home.", "The pet of {s} is {an}."),
    "food": (
        "{s} likes {v}.",
        "{s} often eats {v}.",
        "{s} is fond of {v}.",
        "The favourite food of {s} is {v}.",
    ),
    "hobby": ("{s} enjoys {v}.", "{s} spends weekends on {v}.", "{s} loves {v}.", "The hobby of {s} is {v}."),
}
PERSON_QUESTIONS = {
    "city": ("Where does {s} live?", "In which town is the home of {s}?"),
    "job": ("What is the job of {s}?", "What does {s} work as?"),
    "pet": ("Which animal does {s} keep?", "What is the pet of {s}?"),
    "food": ("What does {s} like to eat?", "What is the favourite food of {s}?"),
    "hobby": ("What does {s} enjoy?", "What is the hobby of {s}?"),
}
PERSON_POLAR = {
    "city": "does {s} live in {v}",
    "job": "does {s} work as {an}",
    "pet": "does {s} keep {an}",
    "food": "does {s} like {v}",
    "hobby": "does {s} enjoy {v}",
}
KIND_STATEMENTS = {  # {e} is the entity
    "material": ("A {e} is made of {v}.", "People make a {e} out of {v}.", "The {e} consists of {v}."),
    "room": ("A {e} belongs in the {v}.", "People keep a {e} in the {v}.", "Look for the {e} in the {v}."),
    "use": ("A {e} is good for {v}.", "People take a {e} for {v}.", "The {e} helps with {v}."),
    "colour": ("A {e} is usually {v}.", "Most people have a {e} that is {v}.", "The colour of a {e} is {v}."),
    "diet": ("The {e} feeds on {v}.", "The food of the {e} is {v}.", "Give the {e} some {v}."),
    "habitat": ("The {e} lives in a {v}.", "You find the {e} in a {v}.", "The {e} sleeps in a {v}."),
    "sound": ("The {e} often {v}.", "When it is happy the {e} {v}.", "At night the {e} {v}."),
    "taste": ("People say {e} taste {v}.", "The taste of {e} is {v}.", "Most find {e} rather {v}."),
    "store": ("People keep {e} in a {v}.", "The place for {e} is a {v}.", "You find {e} in a {v}."),
    "season": ("People eat {e} in {v}.", "The season for {e} is {v}.", "The best time for {e} is {v}."),
    "region": ("{e} lies in {v}.", "The town of {e} is in {v}.", "To reach {e} go to {v}."),
    "river": ("{e} stands on the {v}.", "The river at {e} is the {v}.", "In {e} boats sail on the {v}."),
    "weather": ("{e} is known for {v}.", "The weather in {e} brings {v}.", "In {e} people expect {v}."),
    "industry": ("{e} produces {v}.", "The factories of {e} make {v}.", "Much {v} comes from {e}."),
    "tool": ("A {e} needs the {v}.", "The tool of a {e} is the {v}.", "Every {e} has a {v}."),
    "workplace": ("A {e} works in the {v}.", "You meet a {e} in a {v}.", "The place of a {e} is a {v}."),
    "day": ("A {e} rests on {v}.", "The free day of a {e} is {v}.", "No {e} works on {v}."),
}
TWO_HOP_QUESTIONS = {
    ("city", "region"): ("In which part of the land does {s} live?",),
    ("city", "river"): ("Which river flows near the home of {s}?",),
    ("job", "workplace"): ("In what kind of place does {s} work?",),
    ("job", "day"): ("On which day does {s} rest?",),
    ("pet", "diet"): ("What does the pet of {s} feed on?",),
    ("pet", "habitat"): ("Where do animals like the pet of {s} live?",),
    ("food", "taste"): ("How does the favourite food of {s} taste?",),
    ("food", "store"): ("Where should {s} keep the favourite food?",),
}
TWO_HOP_STATEMENTS = {
    ("city", "region"): "{s} lives in {v}.",
    ("city", "river"): "{s} lives near the {v}.",
    ("job", "workplace"): "{s} works in the {v}.",
    ("job", "day"): "{s} rests on {v}.",
    ("pet", "diet"): "{s} has a pet that feeds on {v}.",
    ("pet", "habitat"): "{s} has a pet that lives in a {v}.",
    ("food", "taste"): "{s} likes food that tastes {v}.",
    ("food", "store"): "{s} keeps food in a {v}.",
}


THING_HINTS = {  # what follows for the owner from a fact about the thing; {v} is the value of the relation
    "material": "{s} has something made of {v}.",
    "room": "{s} has something for the {v}.",
    "use": "{s} has something for {v}.",
    "colour": "{s} has something {v}.",
}
THING_OWNERSHIP = ("{s} bought {an}.", "{s} found {an}.", "{s} has {an}.")


def article(noun: str) -> str:
    """`noun` with its indefinite article: "an owl", "a baker"."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def say(wording: str, subject: str, value: str) -> str:
    """Fill a person's wording."""
    return wording.format(s=subject, v=value, an=article(value))


def say_kind(wording: str, entity: str, value: str) -> str:
    """Fill a kind's wording; "A owl" becomes "An owl"."""
    sentence = wording.format(e=entity, v=value)
    for wrong, right in ((" a ", " an "), ("A ", "An ")):
        for word in (entity, value):
            if word[0].lower() in "aeiou":
                sentence = sentence.replace(wrong + word, right + word)
    return sentence


def stem(relation: str, entity: str) -> str:
    """The first wording of a kind's relation without its value: "A kettle is made of"."""
    return say_kind(KIND_STATEMENTS[relation][0].removesuffix(" {v}."), entity, "value")
