"""What every page of a report has: its stylesheet, its script, and its frame."""

LEVELS = 12  # of colour in a heat map

STYLE = """
:root { --paper: #fff; --ink: #1c2024; --soft: #60666e; --line: #dfe3e8; --bed: #f1f4f8;
  --heat: #14468f; --alarm: #d6304a; --bar: #3f76c4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e6e8eb; --soft: #9aa2ac; --line: #2d333b; --bed: #1c2127;
    --heat: #a3ceff; --alarm: #ff5468; --bar: #6ea5ec }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 24px; max-width: 1680px; background: var(--paper); color: var(--ink);
  font: 14px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { margin: 0 0 16px; font-size: 22px; font-weight: 600; overflow-wrap: anywhere }
small, figcaption, dt, .note, .tools { color: var(--soft); font-size: 12px }
code { font: 12.5px/1.35 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; unicode-bidi: isolate }
dl { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 0 0 16px }
dd { margin: 0; font-size: 18px; overflow-wrap: anywhere }
.note { max-width: 90ch; margin: 0 0 8px; font-size: 13px }
.tools { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 16px; margin: 16px 0 8px }
input { flex: 0 1 320px; min-width: 0; padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--bed); color: inherit; font: inherit; font-size: 14px }
:focus-visible { outline: 2px solid var(--bar); outline-offset: 1px }
.legend svg { width: 96px; height: 10px; margin: 0 4px; background: var(--bed) }
.legend i { display: inline-block; width: 4px; height: 12px; margin-left: 4px; background: var(--alarm); vertical-align: -2px }
table { width: 100%; border-collapse: collapse; table-layout: fixed }
thead { position: sticky; top: 0; z-index: 1; background: var(--paper); box-shadow: 0 1px var(--line) }
thead th { padding: 0 }
thead button { width: 100%; padding: 8px; border: 0; background: none; color: var(--soft); font: inherit; font-size: 12px;
  text-align: left; cursor: pointer }
[aria-sort] button { color: var(--ink); font-weight: 600 }
[aria-sort=ascending] button::after { content: " \\25B2" }
[aria-sort=descending] button::after { content: " \\25BC" }
th:nth-child(1) { width: 20% }
th:nth-child(2) { width: 11% }
th:nth-child(3) { width: 9% }
th:nth-child(4), th:nth-child(5), th:nth-child(6) { width: 6.5% }
th:nth-child(7) { width: 12% }
tbody th, td { padding: 8px; border-top: 1px solid var(--line); text-align: left; vertical-align: top; font-weight: 400 }
tbody th small { display: block }
tbody p { margin: 2px 0 0; font-size: 12px; overflow-wrap: anywhere }
td { overflow-wrap: anywhere }
.skipped { color: var(--soft) }
svg { display: block }
.legend svg { display: inline-block }
.bar { width: 100%; height: 4px; margin-top: 4px; background: var(--bed); fill: var(--bar) }
.span { width: 100%; height: 10px; margin-top: 3px; fill: var(--bar) }
.span path { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; fill: none }
figure { margin: 0 }
figure + figure { margin-top: 4px }
figcaption b { color: var(--ink); font-weight: 600 }
em { color: var(--alarm); font-style: normal }
.heat { width: 100%; height: 20px }
.bed { fill: var(--bed) }
path { stroke: var(--heat); stroke-width: 18 }
.legend path { stroke-width: 2 }
g { fill: var(--alarm) }
g path { stroke: var(--alarm); stroke-width: 22 }
""" + "".join(f".h{level} {{ stroke-opacity: {(level + 1) / LEVELS:.2f} }}\n" for level in range(LEVELS)) + """
@media (max-width: 900px) {
  body { padding: 14px }
  table, thead, tbody, tbody th, td { display: block; width: auto }
  thead { position: static; box-shadow: none }
  thead tr { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 10px }
  thead th:nth-child(n) { width: auto }
  thead button { padding: 6px 10px; border: 1px solid var(--line); border-radius: 999px }
  tbody tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px 12px; padding: 12px 0;
    border-top: 1px solid var(--line) }
  tbody tr[hidden] { display: none }
  tbody th, td { padding: 0; border: 0 }
  tbody th:nth-child(n), td:nth-child(2), td:nth-child(3), td:nth-child(8) { width: auto }
  tbody th, td:nth-child(7), td:nth-child(8) { grid-column: 1 / -1 }
  td:nth-child(2) { grid-column: 1 / 3 }
  td::before { content: attr(data-label); display: block; color: var(--soft); font-size: 12px }
  td:nth-child(8)::before, .none { display: none }
}
@media print { .tools input { display: none } thead { position: static } tr { break-inside: avoid } }
"""

SCRIPT = """
const one = selector => document.querySelector(selector);
const body = one("tbody"), rows = body ? [...body.rows] : [], buttons = [...document.querySelectorAll("thead button")];
const input = one("input"), counter = one("[role=status]"), opposite = { ascending: "descending", descending: "ascending" };
function compare(a, b) {
  return isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a === b ? 0 : a - b;
}
buttons.forEach((button, column) => button.onclick = () => {
  const head = button.parentNode, was = head.getAttribute("aria-sort");
  const order = opposite[was] || button.dataset.first, sign = order === "ascending" ? 1 : -1;
  for (const b of buttons) b.parentNode.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const value = row => row.cells[column].dataset.v;
  rows.sort((a, b) => {
    const x = value(a), y = value(b);
    return x === undefined ? (y === undefined ? 0 : 1) : y === undefined ? -1 : sign * compare(x, y);
  });
  body.append(...rows);
});
if (input) input.oninput = () => {
  const words = input.value.toLowerCase().split(/\\s+/);
  let shown = 0;
  for (const row of rows) {
    const text = (row.cells[0].textContent + " " + row.cells[1].textContent).toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    shown += !row.hidden;
  }
  counter.textContent = shown + " of " + rows.length + (rows.length === 1 ? " site" : " sites");
};
"""

LEGEND = "".join(f'<path class=h{level} d="M{level} 0h1"/>' for level in range(LEVELS))

NOTHING = "<p class=note>There is no site to show: nothing of this model has run compiled.</p>"

TABLE = """<div class=tools>
<input type=search placeholder="Filter sites, formats, kernels" aria-label="Filter sites, formats, kernels">
<span role=status>{shown}</span>
<span class=legend>channel magnitude, log scale: <small>{least}</small>
<svg viewBox="0 -1 12 2" preserveAspectRatio=none aria-hidden=true>{legend}</svg>
<small>100%</small> of the site's largest; <i></i> outlier, above 6 times the median</span></div>
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
"""

PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="{policy}">
<meta name=color-scheme content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<dl>{summary}</dl>
{notes}
</header>
<main>
{table}</main>
<script>{script}</script>
</body>
</html>
"""
