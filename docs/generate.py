"""Fill the generated blocks of README.md and of the pages in docs/ from conf/, runs/reference and docs/deviations.md.

    python docs/generate.py            # after a change of a preset, an option, a deviation or a committed result
    python docs/generate.py --check    # name the files that are out of date, and exit with 1

A block stands between ``<!-- generated: KIND ARGUMENTS -->`` and ``<!-- end -->``; a function of this file makes its
text. The tables of runs/reference are those that ``python -m analysis`` wrote: no number is typed here or in a page.
"""

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pandas as pd
import yaml
from hydra.utils import get_class

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = ROOT / "runs" / "reference"
BLOCK = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
# What is no option: set by adapter.r, adapter.alpha and adapter.targets for every method, or part of the method.
SHARED = ("r", "lora_alpha", "target_modules")
SHARED += ("_target_", "name", "task_type", "merges", "trains", "version")

RESULT = """The embedded model, pruned by Wanda to 0.7, three seeds, the rate of its own search; mean ± standard
deviation of the average of seven tasks. *keep zeros: no* is the published form, without the mask.
[All columns](../../runs/reference/all_methods/tables.md), [how to read them](../tables.md).

"""
VERDICTS = """What the paper claims, judged on the runs of this project ([how](../tables.md#claims)):

"""


@dataclass(frozen=True)
class Table:
    """A Markdown table: names of the columns, their alignments, and the cells of each row."""

    columns: list[str]
    alignments: list[str]
    rows: list[list[str]]

    def select(self, *columns: str) -> "Table":
        """The table with these columns only; a name that stands twice gives both."""
        if unknown := set(columns) - set(self.columns):
            raise ValueError(f"no column {', '.join(sorted(unknown))} among {', '.join(self.columns)}")
        kept = [index for name in columns for index, column in enumerate(self.columns) if column == name]
        pick = lambda cells: [cells[index] for index in kept]  # noqa: E731
        return Table(pick(self.columns), pick(self.alignments), [pick(row) for row in self.rows])

    def where(self, keep: Callable[[list[str]], object]) -> "Table":
        """The table with the rows that ``keep`` accepts."""
        return Table(self.columns, self.alignments, [row for row in self.rows if keep(row)])

    def __str__(self) -> str:
        lines = [self.columns, self.alignments, *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(columns: list[str], rows: list[list[str]]) -> Table:
    """A table with all columns aligned to the left."""
    return Table(columns, ["---"] * len(columns), rows)


def escaped(text: str) -> str:
    """Text that may stand in a cell."""
    return text.replace("|", "\\|")


@cache
def tables_of(file: Path) -> list[Table]:
    """The tables of a Markdown file, in order."""
    found: list[list[list[str]]] = [[]]
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
        elif found[-1]:
            found.append([])
    return [Table(lines[0], lines[1], lines[2:]) for lines in found if lines]


def result_tables(experiment: str) -> list[Table]:
    """The tables that the analysis wrote beside a committed experiment."""
    (file,) = [file for file in (REFERENCE / experiment).glob("*.md")]
    return tables_of(file)


# ---- what is known of a method: its page, its options, its rows


def pages() -> list[Path]:
    """The pages of the methods."""
    return [page for page in sorted((DOCS / "methods").glob("*.md")) if page.stem != "index"]


def page_of(method: str) -> Path:
    """The page of a method of conf/method: its own, or that of the method whose form it is (spp for spp_gc)."""
    own = DOCS / "methods" / f"{method}.md"
    return own if own.exists() else own.with_stem(method.partition("_")[0])


def methods_of(page: Path) -> list[str]:
    """The methods of conf/method that a page describes."""
    return [file.stem for file in sorted((ROOT / "conf/method").glob("*.yaml")) if page_of(file.stem) == page]


def title_of(page: Path) -> str:
    """The name of the method, as tables have it."""
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").strip()


def is_row_of(page: Path) -> Callable[[list[str]], object]:
    """Whether a row of a table, by its first cell, belongs to a method or to one of its forms and end states."""
    name = re.compile(rf"{re.escape(title_of(page))}($|,| \+ GC)", re.IGNORECASE)
    return lambda row: name.match(row[0])


def comments_of(file: Path) -> list[tuple[str, str, str]]:
    """Dotted key, default and comment of every option in a file of conf/method."""
    found, comment, parents = [], [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        indent, text = (len(line) - len(line.lstrip())) // 2, line.strip()
        if text.startswith("# "):
            comment.append(text[2:])
        elif match := re.match(r"(\w+):\s*(.*)", text):
            parents[indent:] = [match[1]]
            if match[2] and not match[2].startswith("{_target_"):
                found.append((".".join(["method", *parents]), match[2], " ".join(comment)))
            comment = []
        else:
            comment = []
    return found


def help_of(file: Path) -> dict[str, str]:
    """What the classes of a method say of its options: the PEFT config in its fields, the method in its docstring."""
    method = yaml.safe_load(file.read_text(encoding="utf-8"))
    texts = {}
    if peft := method.get("peft"):
        config = get_class(peft["_target_"])
        texts = {f"method.peft.{field.name}": field.metadata.get("help", "") for field in fields(config)}
    own = get_class(method["_target_"])
    for documented in (own.__doc__, own.__init__.__doc__):
        for name, text in re.findall(r"^ +(\w+): ((?:.+\n?)(?: {12,}.+\n?)*)", documented or "", re.MULTILINE):
            texts.setdefault(f"method.{name}", " ".join(text.split()))
    return texts


# ---- the kinds of blocks; each function gets the page and the arguments of the block


def options(page: Path) -> str:
    """The options of a method with their defaults, a column for each of its forms in conf/method."""
    methods, defaults, meanings = methods_of(page), {}, {}
    for method in methods:
        file = ROOT / "conf" / "method" / f"{method}.yaml"
        helps = help_of(file)
        for key, default, comment in comments_of(file):
            if key.rpartition(".")[2] not in SHARED and key != "method.keep_zeros":
                defaults.setdefault(key, {})[method] = f"`{escaped(default)}`"
                meanings.setdefault(key, escaped(f"{helps.get(key, '')} {comment}".strip()))
    rows = [[f"`{key}`", *(defaults[key].get(method, "") for method in methods), meanings[key]] for key in defaults]
    names = [f"`method={method}`" for method in methods]
    return str(table(["option", *names, "meaning"], rows)) if rows else f"{', '.join(names)}: none.\n"


def deviations(page: Path) -> str:
    """The rows of docs/deviations.md that belong to a method."""
    name = re.escape(title_of(page).replace("³", "^3").replace("Full fine-tuning", "full"))
    pattern = re.compile(rf"{name}( \w+)?(-GC)?$")
    rows = tables_of(DOCS / "deviations.md")[0].where(lambda row: pattern.match(row[0]))
    if not rows.rows:
        return "None that is known.\n"
    one_name = {row[0] for row in rows.rows} == {title_of(page)}
    return str(rows.select(*rows.columns[1:]) if one_name else rows)


def cost(page: Path) -> str:
    """Memory of a simulated step of Llama-2-7B, and time of a measured one on a CPU."""
    own = is_row_of(page)
    plain, checkpointed = result_tables("methods_simulated")[:2]
    by_name = {row[0]: row for row in checkpointed.rows}
    peak, ratio = plain.columns.index("peak (GiB)"), plain.columns.index("of LoRA")
    memory = [
        [row[0], row[peak], row[ratio], by_name[row[0]][peak], by_name[row[0]][ratio]]
        for row in plain.rows
        if own(row) and row[0] in by_name
    ]
    profile = result_tables("methods_profile")[0].where(own)
    parts = []
    if memory:
        columns = ["Llama-2-7B, simulated", "peak of a step (GiB)", "× LoRA", "with checkpointing (GiB)", "× LoRA"]
        parts.append(str(table(columns, memory)))
    if profile.rows:
        step = profile.columns.index("step (ms)")
        columns = ["TinyLlama, two layers, CPU", "trained parameters", "step (ms)", "× LoRA"]
        trained = profile.columns.index("trainable")
        parts.append(str(table(columns, [[row[0], row[trained], row[step], row[step + 1]] for row in profile.rows])))
    return "\n".join(parts)


def result(page: Path) -> str:
    """Scores of a method beside its controls, and the verdicts on what its paper claims."""
    own = is_row_of(page)
    columns = ("method", "keep zeros", "learning rate", "n", "average (acc)", "Δ LoRA", "zeros kept (%)")
    scores = result_tables("all_methods")[0].select(*columns)
    controls = ("dense", "dense, fine-tuned (LoRS)", "pruned", "LoRA, with adapter")
    parts = [RESULT + str(scores.where(lambda row: row[0] in controls or own(row)))]
    verdicts = tables_of(REFERENCE / "claims.md")[0].where(lambda row: row[0].partition(" (")[0] == title_of(page))
    if verdicts.rows:
        parts.append(VERDICTS + str(verdicts.select("claim", "verdict", "evidence")))
    return "\n".join(parts)


def experiment_table(page: Path, experiment: str, number: str = "0", *columns: str) -> str:
    """A table of a committed experiment, whole or with some of its columns."""
    found = result_tables(experiment)[int(number)]
    return str(found.select(*columns) if columns else found)


def measured(page: Path, file: str, *columns: str) -> str:
    """Columns of a committed CSV file, numbers with three digits."""
    frame = pd.read_csv(REFERENCE / file)[list(columns)]
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in frame.values.tolist()]
    return str(table(list(columns), cells))


def gap(page: Path, file: str) -> str:
    """The table of a committed Markdown file of `analysis gap`."""
    return str(tables_of(REFERENCE / file)[0])


def summary(page: Path, experiment: str, scores: str, costs: str) -> str:
    """Two tables of an experiment, short and in one: what each method scores, and the memory that it trains in."""
    names = ("method", "exact gradient")
    found = result_tables(experiment)[int(scores)]
    found = found.select(
        *names, "n", "held-out answers (perplexity)", "WikiText-2 perplexity", "average (acc)", "zeros kept (%)"
    ).where(lambda row: row[0] != "dense, fine-tuned")
    cost = result_tables(experiment)[int(costs)]
    place = cost.columns.index("memory (MiB)")
    memory = {
        (row[0].partition(",")[0], row[cost.columns.index(names[1])]): row[place : place + 2] for row in cost.rows
    }
    rows = [[*row, *memory.get((row[0].partition(",")[0], row[1]), ["-", "-"])] for row in found.rows]
    return str(Table([*found.columns, "memory (MiB)", "memory × LoRA"], [*found.alignments, "---:", "---:"], rows))


def claims(page: Path) -> str:
    """What the papers claim, with a verdict and the evidence."""
    found = tables_of(REFERENCE / "claims.md")[0]
    return str(found.select("paper", "claim", "verdict", "evidence"))


def search(page: Path) -> str:
    """What experiment=value_search tried: the options that differ, and the average."""
    found = result_tables("value_search")[0]
    first, last = found.columns.index("method") + 1, found.columns.index("n")
    fixed = ("lora alpha", "learning rate")
    rows = []
    for row in found.rows:
        values = zip(found.columns[first:last], row[first:last], strict=True)
        tried = ", ".join(f"{name} {value}" for name, value in values if value != "-" and name not in fixed)
        if tried or row[0] == "pruned":
            rows.append([row[0], tried, row[found.columns.index("average (acc)")]])
    return str(table(["method", "value", "average (acc)"], rows))


def method_list(page: Path) -> str:
    """Every page of a method with the first sentence of its idea."""
    rows = []
    for file in pages():
        idea = file.read_text(encoding="utf-8").partition("## Idea\n\n")[2]
        sentence = " ".join(idea.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."
        rows.append([f"[{title_of(file)}]({file.name})", ", ".join(f"`{name}`" for name in methods_of(file)), sentence])
    return str(table(["method", "`method=`", "idea"], rows))


def presets(page: Path) -> str:
    """The presets of conf/experiment: what each is, and how long it takes, as their first lines say."""
    rows = []
    for file in sorted((ROOT / "conf/experiment").glob("*.yaml")):
        lines = re.match(r"# @package _global_\n# .*\n((?:# .*\n)+)", file.read_text(encoding="utf-8"))[1].splitlines()
        sentences = re.split(r"(?<=[.]) (?=[A-Z0-9`])", " ".join(line[2:].strip() for line in lines))
        jobs = next((sentence for sentence in sentences[1:] if re.search(r"\d+ jobs|estimated", sentence)), "")
        rows.append([f"`{file.stem}`", sentences[0], jobs])
    return str(table(["`experiment=`", "what", "size and time"], rows))


def source(page: Path, file: str) -> str:
    """A source file as it is."""
    return f"```python\n{(ROOT / file).read_text(encoding='utf-8').strip()}\n```"


KINDS: dict[str, Callable[..., str]] = {
    "claims": claims,
    "gap": gap,
    "cost": cost,
    "deviations": deviations,
    "measured": measured,
    "methods": method_list,
    "options": options,
    "presets": presets,
    "result": result,
    "search": search,
    "source": source,
    "summary": summary,
    "table": experiment_table,
}


def filled(file: Path) -> str:
    """The text of a page with all its blocks made anew."""

    def fill(match: re.Match) -> str:
        kind, *arguments = shlex.split(match[2])
        return f"{match[1]}\n{KINDS[kind](file, *arguments)}\n{match[3]}"

    return BLOCK.sub(fill, file.read_text(encoding="utf-8"))


def out_of_date() -> list[Path]:
    """The files with a block that is not what this file makes of it."""
    files = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    return [file for file in files if file.read_text(encoding="utf-8") != filled(file)]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    changed = out_of_date()
    for file in changed:
        print(f"{file.relative_to(ROOT)}: out of date" if "--check" in sys.argv else file.relative_to(ROOT))
        if "--check" not in sys.argv:
            file.write_text(filled(file), encoding="utf-8")
    sys.exit(1 if changed and "--check" in sys.argv else 0)
