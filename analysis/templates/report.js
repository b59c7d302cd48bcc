"use strict";

// The page is complete without this file. With it, tables sort, runs can be filtered, and a table says what it hides.

// Sorting: first by falling numbers (or rising words), then the other way, then as written. Empty cells stay last.
function sortable(table) {
  const body = table.tBodies[0];
  const written = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const texts = new Map(written.map((row) => [row, row.cells[column].textContent.trim()]));
    const number = (row) => parseFloat(texts.get(row).replaceAll(",", ""));
    const missing = (row) => ["", "-", "OOM"].includes(texts.get(row));
    const words = written.some((row) => !missing(row) && Number.isNaN(number(row)));
    const cycle = words ? ["ascending", "descending", "none"] : ["descending", "ascending", "none"];
    const order = cycle[(cycle.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => (missing(a) - missing(b)) || (missing(a) ? 0
      : sign * (words ? texts.get(a).localeCompare(texts.get(b), "en", { numeric: true }) : number(a) - number(b)));
    body.append(...(order === "none" ? written : [...written].sort(compare)));
  }));
}

// Filtering: runs whose row contains every word.
function filterable(form) {
  const rows = [...document.getElementById("all-runs").tBodies[0].rows];
  const apply = () => {
    const words = form.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    form.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}

// How many columns lie outside of the frame of a wide table.
function countHidden(frame) {
  const { left, right } = frame.getBoundingClientRect();
  const heads = [...frame.querySelectorAll("thead th")].map((head) => head.getBoundingClientRect());
  const hidden = heads.filter((head) => head.width && (head.left < left - 1 || head.right > right + 1)).length;
  frame.querySelector("caption span").dataset.hidden = hidden ? ` (${hidden} of ${heads.length} columns hidden: scroll sideways)` : "";
}

// Closing a run leads back to where it was opened; so does the Escape key.
const close = () => document.querySelector(".run:target") && history.back();
document.querySelectorAll(".run .close").forEach((link) => link.addEventListener("click", (event) => {
  if (history.length > 1) { event.preventDefault(); close(); }
}));
addEventListener("keydown", (event) => event.key === "Escape" && close());

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("form.filter").forEach(filterable);
const frames = document.querySelectorAll(".scroll");
frames.forEach((frame) => frame.addEventListener("scroll", () => countHidden(frame), { passive: true }));
for (const event of ["resize", "hashchange"]) addEventListener(event, () => frames.forEach(countHidden));
document.querySelectorAll("details").forEach((part) => part.addEventListener("toggle", () => part.querySelectorAll(".scroll").forEach(countHidden)));
frames.forEach(countHidden);
