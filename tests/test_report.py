"""The report: whole, self-contained and true to the results; and, where Chromium is installed, what a reader sees."""

import re
import shutil
from html.parser import HTMLParser

import pytest
from synthetic_runs import result, write

from analysis import report
from analysis.__main__ import main
from analysis.results import load
from analysis.tables import build

METHODS = {"lors": 0.74, "lora": 0.73, "spp": 0.70}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page is made of: ids, links, what it loads, tables as rows of texts; fails if tags do not nest."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.tables, self.unnamed, self._open = [], [], [], [], [], []
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.loads += [value for name, value in values.items() if name == "src" or (name == "href" and tag == "link")]
        if (tag == "img" and not values.get("alt")) or (tag == "input" and not values.get("aria-label")):
            self.unnamed.append(values)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "tr" in self._open and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip("\n")

    def table(self, *headers):
        """Header and rows of the first table that has these columns."""
        return next(rows for rows in self.tables if set(headers) <= set(rows[0]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with space") / "runs"
    for method, accuracy in METHODS.items():
        states = ("adapter", "remasked", "dense") if method == "lora" else ("merged",)
        for seed in range(3):
            score = accuracy + 0.002 * seed
            write(folder, result(method, seed=seed, accuracy=score, states=states, pruned=(0.6, 1.2)))
    write(folder, result("sqft", status="oom"), result("none", accuracy=0.6, loss=1.2))
    write(folder, result("sqft_gc", status="failed", config={"data.name": "<script>alert(1)</script>"}))
    return folder


@pytest.fixture(scope="module")
def page(runs):
    assert main(["report", str(runs)]) == 0
    text = (runs / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_every_link_leads_to_a_place_in_the_page_and_nothing_comes_from_outside(page):
    text, parsed = page
    assert len(parsed.ids) == len(set(parsed.ids)) and {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert all(link.startswith("#") for link in parsed.links) and not parsed.unnamed
    assert parsed.loads and all(source.startswith("data:") for source in parsed.loads)
    assert not re.search(r"https?://|@import|url\(|fetch\(", text)


def test_tables_are_those_of_the_results_with_the_average_first(page, runs):
    _, parsed = page
    (table,) = [table for table in build(load([runs])) if len(table.rows) > 4]
    header, *rows = parsed.table("method", "WikiText-2 perplexity")
    assert header[:2] == ["method", "average (acc)"]
    assert [row[0] for row in rows] == [row.label for row in table.rows]
    for row, shown in zip(table.rows, rows, strict=True):
        for column in table.quality:
            assert shown[header.index(column.title)] == row.cells[column.name].text(column)
    costs = {row[0]: row for row in parsed.table("method", "trainable")[1:]}
    assert costs["SQFT"].count("OOM") > 1


def test_every_run_is_in_the_page_with_key_settings_and_scores(page, runs):
    text, parsed = page
    rows = load([runs]).drop_duplicates("path")
    assert sorted(row[2] for row in parsed.table("run", "key")[1:]) == sorted(rows.key)
    for row in rows.itertuples():
        article = re.search(rf'<article class="run" id="run-{row.key}".*?</article>', text, re.DOTALL)[0]
        assert f"<code>{row.key}</code>" in article and f'<span class="badge {row.status}">' in article
        assert f"<dt>method.name</dt><dd>{row.config['method']['name']}</dd>" in article
    assert text.count("<dt>adapter.r</dt><dd>16</dd>") == 1, "what all runs share is said once"
    scores = {}
    for method in ("lora", "pruned"):
        key = next(row.key for row in rows.itertuples() if row.method == method)
        article = re.search(rf'id="run-{key}".*?</article>', text, re.DOTALL)[0]
        (scores[method],) = Page(article.replace("</article>", "").partition(">")[2]).tables
    assert scores["lora"][0] == ["", "with adapter", "re-masked", "zeros lost"]
    assert ["average", "73.0 ± 0.5", "73.0 ± 0.5", "73.0 ± 0.5"] in scores["lora"]
    assert scores["pruned"][0] == ["", "pruned", "dense"]


def test_rows_link_to_their_runs_by_seed(page, runs):
    text, _ = page
    spp = {int(row.seed): row.key for row in load([runs]).query("method == 'spp'").itertuples()}
    links = re.search(r"SPP</th>.*?</tr>", text, re.DOTALL)[0]
    assert re.findall(r'<a href="#run-(\w+)".*?>(\d)</a>', links) == [(spp[seed], str(seed)) for seed in range(3)]


def test_what_results_contain_is_never_markup(page):
    text, _ = page
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and text.count("<script>") == 1


def test_the_first_table_says_where_the_model_starts_and_what_is_reached(page):
    text, parsed = page
    row = parsed.tables[0][1]
    assert row[:5] == ["microworld, wanda 0.5", "80.0", "60.0", "74.2 ± 0.2", "LoRS"]
    assert row[5] == "within noise" and "10 runs ok, 1 runs oom, 1 runs failed" in text


def test_the_same_results_give_the_same_page_and_one_key_on_two_machines_is_two_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(report.plots, "draw", lambda *_, **__: ([], ["none: not asked for"]))
    write(tmp_path / "a", result("lors"), result("lors", sparsity=0.7))
    write(tmp_path / "b", result("lors", environment={"device": "another"}))
    first = report.page(load([tmp_path]), mix=True)
    assert "none: not asked for" in first and report.page(load([tmp_path]), mix=True) == first
    assert first.count("conditional on one pruned checkpoint and on learning rates from one search seed") >= 2
    key, parsed = result("lors")["key"], Page(first)
    assert {f"run-{key}", f"run-{key}-2"} <= set(parsed.ids)
    header, *_ = parsed.table("method", "0.7")  # the averages come first, and behind the name
    assert header[:4] == ["method", "0.5", "0.7", "device"]


def test_held_out_answers_and_margins_are_in_the_page_where_there_are_any(page, tmp_path, monkeypatch):
    monkeypatch.setattr(report.plots, "draw", lambda *_, **__: ([], []))
    write(tmp_path, result("lora", answers=2.0, margin=0.25), result("lora", sparsity=0.7, answers=2.2, margin=0.2))
    parsed = Page(report.page(load([tmp_path])))
    assert parsed.table("run", "held-out answers")[1][-5] in ("7.39", "9.03")
    header, *rows = parsed.table("method", "openbookqa margin (nats)")
    assert rows[-1][header.index("rte margin (nats)")] == "0.25"
    (scores,) = [rows for rows in parsed.tables if ["held-out answers (perplexity)", "7.39"] in rows]
    assert ["boolq margin (nats)", "0.25 ± 0.50"] in scores
    header, *_ = parsed.table("method", "0.7", "Δ LoRA (nats)")
    assert header[:3] == ["method", "0.5", "0.7"]
    assert "held-out answers" not in page[1].table("run", "key")[0]


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}  # its sandbox does not start as root
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(**options) as found:
        yield found


@pytest.fixture
def shown(browser, page, runs):
    """The page in a window of 1280 x 900 pixels; it may ask the network for nothing and report no error."""
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    asked, errors = [], []
    shown.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.on("console", lambda message: errors.append(message.text))
    address = (runs / "report.html").as_uri()
    shown.goto(address)
    yield shown
    shown.close()
    assert asked == [address] and not errors


def test_a_click_on_a_header_sorts(shown):
    table = shown.locator("#table-1 + .scroll table")
    head, cells = table.locator("th button").nth(1), table.locator("tbody td:nth-child(2)")
    written = cells.all_text_contents()
    head.click()
    texts = cells.all_text_contents()
    numbers = [float(text.split()[0]) for text in texts if text[0].isdigit()]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) > 4
    assert sorted(texts[len(numbers) :]) == ["-", "-", "OOM"]  # what was not measured stays last
    head.click()
    assert [float(text.split()[0]) for text in cells.all_text_contents()[: len(numbers)]] == numbers[::-1]
    head.click()
    assert cells.all_text_contents() == written


def test_a_link_opens_its_run_and_escape_leads_back(shown):
    link = shown.locator("#table-1 + .scroll tr", has_text="SPP").locator(".links a").nth(2)
    link.click()
    (opened,) = [run for run in shown.locator("article.run").all() if run.is_visible()]
    assert "SPP · microworld · wanda 0.5 · seed 2" in opened.inner_text()
    shown.keyboard.press("Escape")
    opened.wait_for(state="hidden")
    link.click()
    opened.get_by_text("Close").click()
    opened.wait_for(state="hidden")


def test_runs_are_filtered_by_words(shown):
    shown.locator("input[type=search]").fill("spp wanda")
    rows = [row for row in shown.locator("#all-runs tbody tr").all() if row.is_visible()]
    assert len(rows) == 3 and shown.locator(".filter output").inner_text() == "3 of 12"


def test_a_phone_shows_the_scores_first_and_says_which_columns_it_hides(shown):
    assert shown.locator("caption span[data-hidden]").count() == shown.locator(".scroll caption").count()
    shown.set_viewport_size({"width": 390, "height": 844})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    glance = shown.locator("#glance td").nth(2).bounding_box()
    assert glance["y"] + glance["height"] < 844 and glance["x"] + glance["width"] <= 390
    box = shown.locator("#table-1 + .scroll tbody td").first.bounding_box()
    assert box["x"] + box["width"] <= 390
    caption = shown.locator("#table-1 + .scroll caption span")
    hidden = caption.evaluate("node => getComputedStyle(node, '::after').content")
    assert re.search(r"\d+ of 13 columns hidden: scroll sideways", hidden)
    shown.set_viewport_size({"width": 2400, "height": 844})
    assert caption.evaluate("node => getComputedStyle(node, '::after').content") == '""'
