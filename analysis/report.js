"use strict";

// The page is complete without this file: every link leads to the row of its run, and from there to its files. With it,
// tables sort, runs can be filtered, and a click on a cell opens the runs behind it.

const data = JSON.parse(document.getElementById("run-data").textContent);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#777777"];

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Sorting: first by falling numbers (or rising words), then the other way, then as written. Empty cells stay last.

function sortable(table) {
  const body = table.tBodies[0];
  const written = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => {
      const words = head.classList.contains("words");
      const cycle = words ? ["ascending", "descending", "none"] : ["descending", "ascending", "none"];
      const order = cycle[(cycle.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      body.append(...(order === "none" ? written : sorted(written, column, words, order)));
    });
  });
}

function sorted(rows, column, words, order) {
  const sign = order === "ascending" ? 1 : -1;
  const keys = new Map(rows.map((row) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    return [row, words ? text.toLowerCase() : parseFloat(text)];
  }));
  const missing = (key) => key === "" || key === "-" || Number.isNaN(key);
  return [...rows].sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (words ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  });
}

// Filtering: rows that contain every word, and have the chosen status.

function filterable(form) {
  const rows = [...document.getElementById(form.dataset.table).tBodies[0].rows];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const input = form.querySelector("input");
  const buttons = [...form.querySelectorAll("button")];
  let status = "";
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = (!status || row.dataset.status === status) && words.every((word) => texts.get(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length}`;
  };
  input.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of buttons) button.addEventListener("click", () => {
    status = status === button.value ? "" : button.value;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(status === other.value)));
    apply();
  });
  form.hidden = false;
  apply();
}

// The runs behind a cell.

const dialog = document.getElementById("run");

function openRuns(ids) {
  const tabs = document.getElementById("run-tabs");
  tabs.replaceChildren();
  if (ids.length > 1) for (const id of ids) {
    const tab = make("button", { type: "button", class: "tool" }, data.runs[id].tab);
    tab.addEventListener("click", () => show(id));
    tab.dataset.run = id;
    tabs.append(tab);
  }
  show(ids[0]);
  if (!dialog.open) dialog.showModal();
}

function show(id) {
  const run = data.runs[id];
  document.getElementById("run-title").textContent = run.title;
  for (const tab of document.getElementById("run-tabs").children) {
    tab.setAttribute("aria-pressed", String(tab.dataset.run === id));
  }
  const body = document.getElementById("run-body");
  body.replaceChildren(links(run));
  if (run.error) body.append(make("p", {}, make("span", { class: "badge bad" }, run.status), " ", run.error));
  if (run.scores.length > 1) body.append(make("h4", {}, "Scores"), scores(run.scores));
  const left = make("div"), right = make("div");
  if (run.memory) left.append(make("h4", {}, "Memory at the peak of a training step"), ...memory(run.memory));
  if (run.loss.length > 1) right.append(make("h4", {}, "Training loss"), curve(run.loss));
  body.append(make("div", { class: "columns" }, left, right));
  const groups = make("div", { class: "columns" });
  for (const [title, facts] of run.facts) if (facts.length) groups.append(make("div", {}, make("h4", {}, title), pairs(facts)));
  body.append(groups);
  if (run.command) body.append(make("h4", {}, "Command"), make("code", { class: "command" }, run.command));
  for (const [title, facts] of data.shared) if (facts.length) {
    body.append(make("details", {}, make("summary", {}, `${title}, the same in all runs`), pairs(facts)));
  }
  dialog.scrollTop = 0;
}

function links(run) {
  const files = run.files.map(([name, href]) => make("a", { href }, name));
  return make("p", { class: "links" }, ...files, make("code", {}, run.key));
}

function scores([header, ...rows]) {
  const head = make("tr", {}, ...header.map((name, i) => make("th", { scope: "col", class: i ? "" : "words" }, name)));
  const body = rows.map(([name, ...values]) => make("tr", {}, make("th", { scope: "row" }, name), ...values.map((v) => make("td", {}, v))));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function memory(parts) {
  const bar = make("div", { class: "stack", "aria-hidden": "true" });
  const list = make("dl", { class: "pairs" });
  parts.forEach(([name, share, text], i) => {
    const colour = COLOURS[i % COLOURS.length];
    bar.append(make("span", { style: `width:${100 * share}%;background:${colour}` }));
    list.append(make("dt", {}, make("span", { class: "dot", style: `background:${colour}` }), name), make("dd", {}, text));
  });
  return [bar, list];
}

function curve(points) {
  const values = points.map(([, loss]) => loss);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const last = points[points.length - 1][0];
  const at = points.map(([step, loss]) => `${(100 * step) / last},${38 - (36 * (loss - low)) / (high - low || 1)}`);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", at.join(" "));
  for (const [name, value] of [["viewBox", "0 0 100 40"], ["preserveAspectRatio", "none"], ["class", "curve"], ["role", "img"],
    ["aria-label", `Loss from ${values[0]} to ${values[values.length - 1]} in ${last} steps`]]) svg.setAttribute(name, value);
  svg.append(line);
  return make("div", {}, svg, make("p", { class: "notes" }, `${values[0]} to ${values[values.length - 1]} in ${last} steps`));
}

function pairs(facts) {
  return make("dl", { class: "pairs" }, ...facts.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
}

document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#run-"]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  openRuns((link.closest("[data-runs]")?.dataset.runs ?? link.hash.slice(1)).split(" "));
});
document.getElementById("run-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

// Light or dark: what the system says until the reader says otherwise.

const theme = document.getElementById("theme");
const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  theme.textContent = dark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`);
}
theme.addEventListener("click", () => {
  setTheme(dark() ? "light" : "dark");
  try { localStorage.setItem("theme", document.documentElement.dataset.theme); } catch { /* a page from a file may have no storage */ }
});
let kept = null;
try { kept = localStorage.getItem("theme"); } catch { /* as above */ }
setTheme(kept);
theme.hidden = false;

addEventListener("beforeprint", () => document.querySelectorAll("main details").forEach((part) => { part.open = true; }));
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("form.filters").forEach(filterable);
