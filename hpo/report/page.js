"use strict";
const report = JSON.parse(document.getElementById("report-data").textContent);

// Figures are drawn when they come near the screen, and all of them before the page is printed.

const hasWebGL = (() => {
  try { return Boolean(document.createElement("canvas").getContext("webgl")); } catch { return false; }
})();
const drawn = new Set();
// plotly's own button would send a figure to its makers' server
const config = {
  responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  displayModeBar: window.matchMedia("(max-width: 600px)").matches ? false : "hover", // it would hide the legend
};

function draw(plot) {
  if (drawn.has(plot)) return;
  drawn.add(plot);
  const figure = report.figures[plot.dataset.figure];
  if (figure.data.some((trace) => trace.type === "parcoords") && !hasWebGL) {
    plot.textContent = "This figure needs WebGL, which this browser does not have.";
    return;
  }
  Plotly.newPlot(plot, figure.data, figure.layout, config);
}

const plots = [...document.querySelectorAll("[data-figure]")];
for (const plot of plots) plot.style.minHeight = `${report.figures[plot.dataset.figure].layout.height}px`;
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "200px" });
for (const plot of plots) near.observe(plot);
window.addEventListener("beforeprint", () => {
  plots.forEach(draw);
  printed(true);
});
window.addEventListener("afterprint", () => printed(false));

const choice = document.getElementById("curve-choice");
if (choice) choice.addEventListener("change", () => {
  const plot = document.getElementById("curves-plot");
  plot.dataset.figure = choice.value;
  const figure = report.figures[choice.value];
  Plotly.react(plot, figure.data, figure.layout, config);
  drawn.add(plot);
  document.getElementById("curves-note").textContent = report.notes[choice.value] || "";
});

// The table of all trials: sorted, searched, in pages.

const PER_PAGE = 50;
const PRINTED = 1000; // of more trials, the page says how many are not there
const LONGEST = 300; // characters of a cell; it is searched whole
const { columns, rows } = report.table;
const texts = rows.map((row) => row.map(shown));
const searched = texts.map((row) => row.join("\n").toLowerCase());
const table = document.getElementById("trials-table");
const state = { by: 0, down: false, page: 0, before: 0, atOnce: PER_PAGE, words: [] };

function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1e-4 && size < 1e9 ? String(Number(value.toPrecision(6))) : value.toExponential(4);
}

function compare(a, b) {
  if (a === null || a === undefined) return b === null || b === undefined ? 0 : 1; // what is not there comes last
  if (b === null || b === undefined) return -1;
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en");
  return state.down ? -order : order;
}

function found() {
  const kept = [];
  for (let i = 0; i < rows.length; i++) {
    if (state.words.every((word) => searched[i].includes(word))) kept.push(i);
  }
  return kept.sort((i, j) => compare(rows[i][state.by], rows[j][state.by]) || i - j);
}

function printed(now) { // all trials, then again the page that was shown before
  if (!table) return;
  if (now) state.before = state.page;
  state.page = now ? 0 : state.before;
  state.atOnce = now ? PRINTED : PER_PAGE;
  show();
}

function show() {
  const kept = found();
  const pages = Math.max(1, Math.ceil(kept.length / state.atOnce));
  state.page = Math.min(state.page, pages - 1);
  const first = state.page * state.atOnce;
  const body = document.createElement("tbody");
  for (const i of kept.slice(first, first + state.atOnce)) {
    const line = body.insertRow();
    for (const text of texts[i]) {
      const cell = line.insertCell();
      cell.textContent = text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text;
      if (text.length > LONGEST) cell.title = text;
      if (text.length > 40) cell.className = "long";
    }
  }
  table.tBodies[0].replaceWith(body);
  const last = Math.min(first + state.atOnce, kept.length);
  const many = (n) => n.toLocaleString("en");
  document.getElementById("trials-shown").textContent = kept.length
    ? `${many(first + 1)} to ${many(last)} of ${many(kept.length)} trials` : "no trial has that";
  document.getElementById("trials-before").disabled = state.page === 0;
  document.getElementById("trials-after").disabled = state.page === pages - 1;
}

if (table) {
  const head = table.tHead.rows[0];
  columns.forEach((column, i) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.ariaSort = i === 0 ? "ascending" : "none";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column;
    button.addEventListener("click", () => {
      state.down = state.by === i && !state.down;
      state.by = i;
      state.page = 0;
      [...head.cells].forEach((each) => { each.ariaSort = "none"; });
      cell.ariaSort = state.down ? "descending" : "ascending";
      show();
    });
    cell.append(button);
    head.append(cell);
  });
  document.getElementById("trials-search").addEventListener("input", (event) => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    state.page = 0;
    show();
  });
  for (const [id, step] of [["trials-before", -1], ["trials-after", 1]]) {
    document.getElementById(id).addEventListener("click", () => { state.page += step; show(); });
  }
  show();
}
