"""The report: whole, self-contained and true to the results; and, where a browser is installed, pleasant to click."""

import json
import os
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import Browser
from synthetic_runs import result, write

from analysis import report
from analysis.results import load
from analysis.tables import build

VOID = {"meta", "link", "br", "img", "input", "hr"}
METHODS = {"lors": 0.74, "lora": 0.73, "spp": 0.70}
OUTSIDE = re.compile(r"""(?:https?:)?//|url\(\s*['"]?(?!data:)|@import""")


class Page(HTMLParser):
    """What a page is made of: ids, links, tables as rows of texts, embedded scripts; fails if tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.unnamed: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.sources += [values[name] for name in ("src", "srcset", "action") if name in values]
        self.sources += [values["href"]] if tag == "link" else []
        if (tag == "img" and not values.get("alt")) or (tag == "input" and not values.get("aria-label")):
            self.unnamed.append(self.get_starttag_text()[:80])
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif "tr" in self._open and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    def table(self, *headers: str) -> list[list[str]]:
        """Rows of the first table that has these columns."""
        return next(rows for rows in self.tables if set(headers) <= set(rows[0]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with space") / "runs"
    for method, accuracy in METHODS.items():
        states = ("adapter", "remasked", "dense") if method == "lora" else ("merged",)
        for seed in range(3):
            score = accuracy + 0.002 * seed
            write(folder / "sweep", result(method, seed=seed, accuracy=score, states=states, pruned=(0.6, 1.2)))
    write(folder / "sweep", result("sqft", status="oom"), result("none", accuracy=0.6, loss=1.2))
    write(folder / "sweep", result("sqft_gc", status="failed", config={"data.name": "<script>alert(1)</script>"}))
    return folder


@pytest.fixture(scope="module")
def page(runs):
    from analysis.__main__ import main

    assert main(["report", str(runs)]) == 0
    text = (runs / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_every_link_resolves_and_ids_are_unique(page, runs):
    _, parsed = page
    assert len(parsed.ids) == len(set(parsed.ids))
    inner = {link[1:] for link in parsed.links if link.startswith("#")}
    assert inner <= set(parsed.ids)
    outer = [unquote(link) for link in parsed.links if not link.startswith("#")]
    assert all((runs / link).is_file() for link in outer) and len(outer) > 3 * len(list(runs.rglob("result.json")))


def test_nothing_comes_from_outside(page):
    text, parsed = page
    assert parsed.sources and all(source.startswith("data:") for source in parsed.sources)
    assert not [link for link in parsed.links if OUTSIDE.match(link)]
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    script = parsed.scripts[-1].replace("http://www.w3.org/2000/svg", "")
    assert not OUTSIDE.search(style) and "http" not in script and "fetch(" not in script


def test_everything_has_a_name_for_those_who_do_not_see_it(page):
    text, parsed = page
    assert not parsed.unnamed and '<html lang="en">' in text
    assert text.count("<th ") == text.count('<th scope="')


def test_tables_are_those_of_the_results(page, runs):
    _, parsed = page
    (table,) = [table for table in build(load([runs])) if len(table.rows) > 4]
    rows = {row[0]: row for row in parsed.table("method", "perplexity")[1:]}
    header = parsed.table("method", "perplexity")[0]
    assert set(rows) == {row.label for row in table.rows}
    for row in table.rows:
        for column in table.quality:
            shown = rows[row.label][header.index(column.title.replace(" (", "("))]
            assert shown == row.cells[column.name].text(column)
    costs = {row[0]: row for row in parsed.table("method", "trainable")[1:]}
    assert costs["SQFT"].count("OOM") > 1


def test_every_run_has_its_row_and_its_details(page, runs):
    text, parsed = page
    rows = parsed.table("run", "files", "status")[1:]
    results = [json.loads(file.read_text()) for file in runs.rglob("result.json")]
    assert len(rows) == len(results)
    details = json.loads(re.search(r'id="run-data">(.*?)</script>', text, re.S)[1])["runs"]
    for content in results:
        run = details[f"run-{content['key']}"]
        assert run["status"] == content["status"] and run["key"] == content["key"]
        assert [name for name, _ in run["files"]][:3] == ["config", "log", "result and environment"]
        assert f"run-{content['key']}" in parsed.ids
    lors = next(run for run in details.values() if run["title"].startswith("LoRS"))
    assert lors["scores"][0] == ["", "dense", "pruned", "fine-tuned"] and len(lors["loss"]) == 10
    assert sum(share for _, share, _ in lors["memory"]) == pytest.approx(1, abs=0.01)


def test_zeros_kept_is_one_number_in_the_table_and_in_the_list_of_runs(without_plots, tmp_path):
    """Of 1000 zeros 20 were lost, and 10 new ones gained: 98 % are kept, though there are 99 % as many."""
    content = result("lors")
    content["zeros"] |= {"lost": 20, "gained": 10, "after_merge": 0.5 * 0.99}
    write(tmp_path, content)
    parsed = Page(report.page(load([tmp_path]), tmp_path))
    header, *rows = parsed.table("method", "zeros kept(%)")
    (row,) = [row for row in rows if row[0] == "LoRS"]
    (run,) = parsed.table("run", "files", "status")[1:]
    assert float(row[header.index("zeros kept(%)")]) == 98
    assert float(run[parsed.table("run", "files", "status")[0].index("zeros kept(%)")]) == 98


def test_verdicts_say_what_their_p_values_are_conditional_on(page):
    text, _ = page
    assert text.count("conditional on one pruned checkpoint and on learning rates from one search seed") >= 2


def test_what_results_contain_is_never_markup(page):
    text, parsed = page
    assert "<script>alert" not in text and "\\u003cscript>alert(1)" in text
    assert len(parsed.scripts) == 2


def test_summary_says_what_is_known(page):
    _, parsed = page
    (row,) = parsed.table("average score of", "highest after fine-tuning")[1:]
    assert row[0] == "microworld, wanda 0.5" and row[1:3] == ["80.0", "60.0"]
    assert row[3].startswith("LoRS 74.2 ± 0.2") and row[4] in ("within noise", "beyond noise")


@pytest.fixture
def without_plots(monkeypatch):
    """Plots take most of the time and have tests of their own."""
    monkeypatch.setattr(report.plots, "draw", lambda results, output, mix: ([], ["none: not asked for"]))


def test_the_same_results_give_the_same_page(without_plots, runs):
    first = report.page(load([runs]), runs)
    assert "none: not asked for" in first and report.page(load([runs]), runs) == first


def test_a_folder_elsewhere_links_back(without_plots, runs, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    parsed = Page(report.page(load([runs]), other))
    outer = [unquote(link) for link in parsed.links if not link.startswith("#")]
    assert outer and all(link.startswith("../") and (other / link).is_file() for link in outer)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_the_script_has_no_syntax_error():
    check = subprocess.run(["node", "--check", report.PARTS / "report.js"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.fixture(scope="module")
def browser():
    found = Browser.start()
    if found is None:
        pytest.skip("no chromium with chromedriver on this machine")
    yield found
    found.close()


@pytest.fixture
def shown(browser, page, runs):
    """The page from a file in a browser of 1400 x 900 pixels, and no message of its console at the end."""
    browser.resize(1400, 900)
    browser.open((runs / "report.html").as_uri())
    yield browser
    assert browser.errors() == []


def column(browser, table, number):
    """Texts of a column as they are shown, hidden rows left out."""
    script = """return [...document.querySelectorAll(arguments[0] + ' tbody tr')].filter(row => !row.hidden)
        .map(row => row.cells[arguments[1]].textContent)"""
    return browser.run(script, table, number)


def test_a_click_on_a_header_sorts(shown):
    name, table = "#table-1 + .scroll th:nth-child(3) button", "#table-1 + .scroll"
    written = column(shown, table, 2)
    shown.click(name)
    texts = column(shown, table, 2)
    falling = [float(text.split()[0]) for text in texts if text[0].isdigit()]
    assert falling == sorted(falling, reverse=True) and len(falling) > 4
    assert sorted(texts[len(falling) :]) == ["-", "-", "OOM"]  # what was not measured stays last
    shown.click(name)
    texts = column(shown, table, 2)
    assert [float(text.split()[0]) for text in texts[: len(falling)]] == falling[::-1]
    assert shown.run("return document.querySelector(arguments[0]).parentNode.ariaSort", name) == "ascending"
    shown.click(name)
    assert column(shown, table, 2) == written


def test_a_click_on_a_cell_opens_the_runs_behind_it(shown):
    shown.click("#table-1 + .scroll tr[data-runs*=' '] td:nth-child(3) a")
    assert shown.run("return document.getElementById('run').open")
    title = "return document.getElementById('run-title').textContent"
    assert shown.run(title).endswith("seed 0")
    assert shown.run("return document.querySelectorAll('#run-tabs button').length") == 3
    shown.click("#run-tabs button:nth-child(3)")
    assert shown.run(title).endswith("seed 2")
    links = shown.run("return [...document.querySelectorAll('#run-body .links a')].map(a => a.href)")
    assert [Path(unquote(link.removeprefix("file://"))).is_file() for link in links] == [True] * 4
    assert shown.run("return document.querySelectorAll('#run-body .stack span').length") == 6
    shown.click("#run-close")
    assert not shown.run("return document.getElementById('run').open")
    shown.click("#all-runs tbody tr:last-child th a")
    shown.press("\ue00c")  # escape
    assert not shown.run("return document.getElementById('run').open")


def test_runs_are_filtered_by_words_and_status(shown):
    everything = len(column(shown, "#all-runs", 0))
    shown.type(".filters input", "spp 0.5")
    assert len(column(shown, "#all-runs", 0)) == 3
    shown.run("const i = document.querySelector('.filters input'); i.value = ''; i.dispatchEvent(new Event('input'))")
    shown.click(".filters button[value=oom]")
    assert [text.split()[0] for text in column(shown, "#all-runs", 0)] == ["SQFT"]
    assert shown.run("return document.querySelector('.filters output').textContent") == f"1 of {everything}"


def test_colours_switch_and_stay_readable(shown):
    script = """const style = getComputedStyle(document.body);
        return [style.color, style.backgroundColor].map(c => c.match(/[0-9]+/g).map(Number))"""
    light, seen = shown.run(script), []
    shown.click("#theme")
    for ink, paper in (light, shown.run(script)):
        seen.append(sum(paper))
        assert contrast(ink, paper) >= 7  # WCAG AAA
    assert (seen[0] > 600) != (seen[1] > 600)
    shown.click("#theme")
    assert shown.run(script) == light


def contrast(a, b):
    def luminance(colour):
        parts = [c / 255 for c in colour[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", [1400, 500])
def test_the_page_is_never_wider_than_the_window(shown, width):
    shown.resize(width, 900)
    assert shown.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_page_asks_the_network_for_nothing(browser, page, runs):
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    directory = runs

    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=os.fspath(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.open(f"http://127.0.0.1:{server.server_port}/report.html")
        loaded = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/report.html"] and all(name.startswith("data:") for name in loaded)
