"""The frame and the style of the report: plain CSS, light or dark as the reader's system is, for wide and narrow screens."""

from __future__ import annotations

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root {
  --ground: #f6f5f2; --card: #ffffff; --text: #23262b; --soft: #676d76; --line: #e0ddd6; --accent: #1f6f78;
  --chip: #eef3f3; --warn: #fbf0d9; --warn-text: #6b4a06;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15171a; --card: #1e2125; --text: #e6e4df; --soft: #9aa1aa; --line: #33373d; --accent: #6fc3c9;
    --chip: #283034; --warn: #3a2f16; --warn-text: #f0d79b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 78rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
header p { margin: .4rem 0 0; color: var(--soft); }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
h3 { font-size: .85rem; font-weight: 500; margin: 0; color: var(--soft); }
.note, .legend { color: var(--soft); font-size: .88rem; margin: .2rem 0 .9rem; }
.legend { margin-top: 2.6rem; }
.warning { background: var(--warn); color: var(--warn-text); padding: .6rem .9rem; border-radius: 8px; margin: 1rem 0 0; }
.wide { overflow-x: auto; margin: 0 0 1.1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { font-size: .8rem; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody th { font-weight: 600; max-width: 16rem; min-width: 7.5rem; white-space: normal; overflow-wrap: break-word; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td small { display: block; color: var(--soft); font-size: .74rem; }
td.same { color: var(--soft); }
td.differs { font-weight: 600; }
td.differs small { font-weight: 400; }
table.how td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.how th { font-weight: 500; color: var(--soft); }
.range {
  display: block; position: relative; height: 3px; margin-top: .3rem; border-radius: 2px; background: var(--line);
}
.range i { position: absolute; top: 0; bottom: 0; border-radius: 2px; background: var(--accent); max-width: 100%; }
.cards {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1rem; align-items: start;
}
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1rem 1rem; min-width: 0;
}
.picture {
  display: block; margin: .6rem auto 0; width: auto; height: auto; min-width: min(100%, 9rem); max-width: 100%;
  max-height: 17rem; object-fit: contain; border-radius: 8px;
}
.missing {
  margin: .6rem 0 0; padding: .8rem; border: 1px dashed var(--line); border-radius: 8px; color: var(--soft);
  font-size: .85rem;
}
dl { margin: .2rem 0 0; }
dt { margin-top: .75rem; font-size: .8rem; font-weight: 600; color: var(--accent); }
dd { margin: 0; }
dd p { margin: .1rem 0 0; max-height: 14rem; overflow: auto; white-space: pre-line; }
.chip {
  display: inline-block; background: var(--chip); color: var(--text); border-radius: 99px; padding: 0 .5rem;
  margin-left: .2rem;
  font-size: .74rem; font-weight: 500; white-space: nowrap;
}
.foreign { text-decoration: underline dotted var(--soft); text-underline-offset: .2em; }
.looked { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .45rem; }
.looked figure { margin: 0; width: 4.4rem; }
.tile {
  display: block; position: relative; overflow: hidden; border-radius: 5px; aspect-ratio: var(--a);
  background: var(--p) center / 100% 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.tile img { position: absolute; inset: 0; width: 100%; height: 100%; }
figcaption { font-size: .72rem; line-height: 1.25; text-align: center; color: var(--soft); margin-top: .1rem; }
details { margin-top: .8rem; font-size: .88rem; }
.card details { border-top: 1px solid var(--line); padding-top: .5rem; }
summary { cursor: pointer; color: var(--soft); }
details ul { margin: .3rem 0 0; padding-left: 1.1rem; }
@media print { .card { break-inside: avoid; } }
""".strip()
