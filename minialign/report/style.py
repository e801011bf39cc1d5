"""The style sheet of a report: for screens of any width, light and dark, and for paper."""

# Colors have names, because the dark ones replace them. No meaning rests on a color alone. Wrong
# mentions are bold with a wavy line, right ones have a thin line. Curves differ by their dashes, or
# are named in a key.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f5f6f8; --ink: #1b1e23; --muted: #59616c; --line: #d5d9df;
  --base: #7b8490; --control: #a86200; --aligned: #1c5bd0;
  --right: #14692c; --wrong: #b3201a; --wrong-panel: #fdeceb; --written: #8a4b00;
  --first: #1c5bd0; --second: #a86200; --third: #6f3fb5; --fourth: #00767a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1d2127; --ink: #e9ebee; --muted: #a7afb9; --line: #3a414a;
    --base: #98a2ae; --control: #e3a64c; --aligned: #7cabff;
    --right: #7ed895; --wrong: #ff9c94; --wrong-panel: #431d1b; --written: #f0b562;
    --first: #7cabff; --second: #e3a64c; --third: #c09cff; --fourth: #52c7ca;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.75rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.5rem; }
p, ul { max-width: 46rem; margin: 0.5rem 0; }
ul { padding-left: 1.25rem; }
a { color: var(--aligned); }
nav a { margin-right: 1rem; white-space: nowrap; }
.muted { color: var(--muted); }
.small { font-size: 0.875rem; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.6rem 0.75rem; margin: 0.5rem 0; font-size: 0.875rem; white-space: pre-wrap; }
.grid { display: grid; gap: 1.25rem; align-items: start; margin: 0.75rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.scroll { overflow-x: auto; }

table { border-collapse: collapse; width: 100%; font-size: 0.875rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
th, td { text-align: right; vertical-align: top; padding: 0.25rem 0.35rem;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.setting { overflow-wrap: anywhere; }
tbody th { font-weight: 400; }
td .small { display: block; color: var(--muted); white-space: nowrap; }

figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.875rem; margin-bottom: 0.25rem; }
figcaption strong { display: block; font-size: 0.95rem; }
svg { display: block; width: 100%; max-width: 30rem; height: auto; overflow: visible; }
svg text { fill: var(--muted); font-size: 11px; font-family: inherit; }
svg text.value { fill: var(--ink); }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .zero { stroke: var(--muted); stroke-width: 1; }
svg .curve { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
svg .hover { fill: var(--ink); opacity: 0; }
svg .hover:hover { opacity: 0.12; }
.key { display: inline-flex; align-items: center; gap: 0.35rem; margin-right: 0.9rem; }
.key svg { width: 26px; height: 10px; flex: none; }
.color-base { stroke: var(--base); fill: var(--base); }
.color-control { stroke: var(--control); fill: var(--control); }
.color-aligned { stroke: var(--aligned); fill: var(--aligned); }
.color-first { stroke: var(--first); fill: var(--first); }
.color-second { stroke: var(--second); fill: var(--second); }
.color-third { stroke: var(--third); fill: var(--third); }
.color-fourth { stroke: var(--fourth); fill: var(--fourth); }
.dashed { stroke-dasharray: 5 4; }
.dotted { stroke-dasharray: 1.5 3; }

.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.75rem; break-inside: avoid; min-width: 0; }
.card img { display: block; width: 9rem; max-width: 100%; height: auto; border-radius: 4px;
  border: 1px solid var(--line); }
.beside { display: grid; grid-template-columns: 9rem 1fr; gap: 0.75rem; align-items: start; }
.card p { margin: 0.4rem 0; }
.answer { margin-top: 0.6rem; padding-left: 0.6rem; border-left: 4px solid var(--line); }
.answer-base { border-color: var(--base); }
.answer-control { border-color: var(--control); }
.answer-aligned { border-color: var(--aligned); }
.said { white-space: pre-wrap; unicode-bidi: isolate; }
.name { font-weight: 600; }
mark { background: none; color: inherit; }
.right { color: var(--right); text-decoration: underline 1px; text-underline-offset: 3px; }
.wrong { color: var(--wrong); background: var(--wrong-panel); font-weight: 700;
  text-decoration: underline wavy 1.5px; text-underline-offset: 3px; }
.cut { color: var(--muted); font-weight: 700; }
.written { color: var(--written); font-style: italic; text-decoration: underline dashed 1px;
  text-underline-offset: 3px; }
.word { display: inline-flex; flex-direction: column; padding: 0 0.15rem; margin-bottom: 0.15rem;
  border-radius: 3px; align-items: center; line-height: 1.25; }
.word small { font-size: 0.7rem; }
.group { display: inline-flex; align-items: baseline; }
.instead { font-style: italic; color: var(--muted); }
.adds-1 { background: rgb(40 110 255 / 0.10); } .adds-2 { background: rgb(40 110 255 / 0.20); }
.adds-3 { background: rgb(40 110 255 / 0.30); } .adds-4 { background: rgb(40 110 255 / 0.42); }
.takes-1 { background: rgb(230 120 0 / 0.14); } .takes-2 { background: rgb(230 120 0 / 0.24); }
.takes-3 { background: rgb(230 120 0 / 0.34); } .takes-4 { background: rgb(230 120 0 / 0.44); }
@media (max-width: 34rem) {
  body { padding: 0.75rem; }
  .beside { grid-template-columns: 1fr; }
  /* The name of a row takes a line of its own, above its numbers. */
  table, thead, tbody, caption { display: block; }
  tr { display: flex; flex-wrap: wrap; border-bottom: 1px solid var(--line); }
  th, td { flex: 1 1 0; border: none; }
  tbody th { flex: 1 0 100%; padding-bottom: 0; }
  thead th:first-child { display: none; }
  td:first-of-type, thead th:nth-child(2) { text-align: left; padding-left: 0; }
  td:last-child, th:last-child { flex-grow: 2; }
}
@media print {
  :root { --page: #ffffff; --panel: #ffffff; --ink: #000000; --muted: #444444; --line: #bbbbbb;
    --base: #7b8490; --control: #a86200; --aligned: #1c5bd0;
    --right: #14692c; --wrong: #b3201a; --wrong-panel: #fdeceb; --written: #8a4b00;
    --first: #1c5bd0; --second: #a86200; --third: #6f3fb5; --fourth: #00767a; }
  body { font-size: 11pt; max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  nav { display: none; }
}
"""
