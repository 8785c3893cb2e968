"""The look of the HTML report: its style sheet, and the script that draws its plots."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --line: #e4e4e0; --text: #1d1f23; --quiet: #62676f;
  --accent: #1f6fd6; --accent-soft: #eaf2fd; --code: #f1f1ee;
  --problem: #c9372c; --warning: #b4690e; --info: #5b6b82;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141619; --card: #1b1e22; --line: #2d3137; --text: #e5e7ea; --quiet: #9aa1ab;
    --accent: #6aa9f7; --accent-soft: #1a2738; --code: #24282d;
    --problem: #f0776c; --warning: #e5a54b; --info: #93a3ba;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 72rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2rem); }
h1, h2, h3 { line-height: 1.2; letter-spacing: -0.015em; text-wrap: balance; }
h1 { font-size: clamp(1.75rem, 5vw, 2.5rem); margin: 0.2rem 0 1.25rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 0.75rem; }
h2.headline { font-size: 1.7rem; margin: 0.2rem 0 1rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
p, ul, ol { max-width: 42rem; }
p { margin: 0 0 0.9rem; }
a { color: var(--accent); }
.eyebrow { color: var(--quiet); font-size: 0.875rem; margin: 0; overflow-wrap: anywhere; }
.goal { color: var(--quiet); font-size: 1.05rem; }
.lede { font-size: 1.1rem; }
.quiet { color: var(--quiet); font-size: 0.9rem; }
.caution { border-left: 3px solid var(--warning); padding-left: 0.9rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code {
  font-size: 0.875em; background: var(--code); padding: 0.1em 0.35em;
  border-radius: 4px; overflow-wrap: anywhere;
}
.next { background: var(--accent-soft); border-radius: 10px; padding: 1.1rem 1.35rem 1.2rem; margin: 2rem 0; }
.next h2 { margin: 0 0 0.35rem; font-size: 1.05rem; }
.next p { margin-bottom: 0.7rem; }
.next pre {
  margin: 0; padding: 0.75rem 1rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 7px;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; font-size: 0.95rem;
}
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1px; margin: 2rem 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
}
.tiles > div { background: var(--card); padding: 0.9rem 1.1rem; }
.tiles dt { color: var(--quiet); font-size: 0.8rem; }
.tiles dd {
  margin: 0; font-size: 1.5rem; font-weight: 600; letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
}
.tiles dd.detail { font-size: 0.85rem; font-weight: 400; letter-spacing: 0; color: var(--quiet); }
.evidence { padding-left: 1.2rem; margin: 0; }
.evidence li { margin-bottom: 0.5rem; }
.finding {
  border-left: 3px solid var(--info); padding: 0.1rem 0 0.1rem 1rem; margin: 0 0 1.1rem; max-width: 43rem;
}
.finding h3 { margin: 0 0 0.15rem; }
.finding p { margin: 0; }
.finding.problem { border-color: var(--problem); }
.finding.warning { border-color: var(--warning); }
.severity { font-size: 0.8rem; font-weight: 400; letter-spacing: 0; margin-left: 0.5rem; color: var(--info); }
.problem .severity { color: var(--problem); }
.warning .severity { color: var(--warning); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td {
  padding: 0.45rem 0.8rem; border-top: 1px solid var(--line);
  text-align: left; vertical-align: top; white-space: nowrap;
}
thead th {
  border-top: 0; white-space: normal; vertical-align: bottom;
  color: var(--quiet); font-weight: 500; font-size: 0.8rem;
}
td.number, th.number { text-align: right; }
td.words { white-space: normal; min-width: min(18rem, 50vw); overflow-wrap: anywhere; }
.whole td, .whole th { white-space: normal; overflow-wrap: anywhere; }
.whole td.number { white-space: nowrap; }
.whole td.words { min-width: 0; }
.compared td { white-space: normal; overflow-wrap: anywhere; width: 34%; }
.wide + p { margin-top: 0.9rem; }
tr.said td { border-top: 0; padding-top: 0; color: var(--text); font-weight: 600; }
tr.best td { font-weight: 600; background: var(--accent-soft); }
tr.lost td { color: var(--quiet); }
figure { margin: 0 0 1.75rem; }
figcaption { color: var(--quiet); font-size: 0.9rem; max-width: 42rem; margin-bottom: 0.25rem; }
.plot { width: 100%; min-height: 6rem; }
.scroll { overflow-x: auto; }
.grid {
  display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
}
.grid figure { min-width: 0; }
.banner {
  margin: 0; max-width: none; padding: 0.7rem clamp(1rem, 4vw, 2rem); text-align: center;
  background: var(--warning); color: #fff;
}
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 0.75rem; }
.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.25rem; margin: 0; font-size: 0.9rem;
}
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
article + article { border-top: 1px solid var(--line); margin-top: 4rem; padding-top: 1rem; }
footer { margin-top: 4rem; color: var(--quiet); font-size: 0.85rem; }
@media (max-width: 60rem) {
  .whole table, .whole tbody, .whole tr, .whole td, .whole td.words { display: block; width: auto; }
  .whole thead { display: none; }
  .whole tr { padding: 0.5rem 0; border-top: 1px solid var(--line); }
  .whole tr:first-child { border-top: 0; }
  .whole td, .whole td.number { border: 0; padding: 0.1rem 0.8rem; text-align: left; white-space: normal; }
  .whole td::before { content: attr(data-header) ": "; color: var(--quiet); }
}
@media (max-width: 34rem) {
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 0.5rem; }
}
@media print {
  :root {
    --page: #ffffff; --card: #ffffff; --line: #cccccc; --text: #000000; --quiet: #444444; --accent: #1f6fd6;
    --accent-soft: #ffffff; --code: #f4f4f4; --problem: #c9372c; --warning: #b4690e; --info: #5b6b82;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  .wide, .scroll { overflow: visible; }
  .next { border: 1px solid var(--line); }
  th, td { white-space: normal; padding: 0.2rem 0.4rem; }
  td.words { min-width: 0; }
  figure, .finding, tr, .tiles { break-inside: avoid; }
  .grid { display: block; }
  details { display: none; }
  article + article { break-before: page; }
}
"""

SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const paint = () => document.querySelectorAll(".plot.drawn").forEach(plot => Plotly.relayout(plot, {
  "font.color": color("--quiet"),
  "hoverlabel.bgcolor": color("--card"),
  "hoverlabel.bordercolor": color("--line"),
  "hoverlabel.font.color": color("--text"),
}));
const draw = () => {
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  for (const plot of document.querySelectorAll(".plot")) {
    const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
    plot.textContent = "";
    plot.classList.add("drawn");
    Plotly.newPlot(plot, data, { ...layout, dragmode }, { responsive: true, displayModeBar: false });
  }
  paint();
  dark.addEventListener("change", paint);
  const resize = () => document.querySelectorAll(".plot.drawn").forEach(plot => Plotly.Plots.resize(plot));
  addEventListener("beforeprint", resize);
  addEventListener("afterprint", resize);
  document.documentElement.dataset.drawn = "yes";
};
const unpack = async () => {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.textContent = await new Response(stream).text();
  document.head.append(library);
  draw();
};
if ("DecompressionStream" in window) unpack();
else document.querySelectorAll(".plot").forEach(plot => { plot.textContent = "This browser is too old."; });
"""
