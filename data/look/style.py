"""The look of the page: one style sheet for light and dark, no other file."""

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #e8eaed); --soft: light-dark(#5c6670, #9aa4ae);
  --paper: light-dark(#f6f7f9, #14171b); --card: light-dark(#fff, #1d2126); --line: light-dark(#dfe3e8, #2e343b);
  --accent: light-dark(#2c62ee, #7ea2ff); --faint: light-dark(#e6edfd, #25304a); --bad: light-dark(#b3261e, #ff8a80); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 2rem clamp(1rem, 3vw, 3rem) 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .8rem; } h2 small { color: var(--soft); font-weight: 400; }
p.lead { margin: .3rem 0 1.4rem; color: var(--soft); }
.facts, .plots, .pictures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(285px, 1fr)); }
.plots figure { display: flex; flex-direction: column; }
.always { flex: 1; display: flex; flex-direction: column; justify-content: center; padding: .8rem 0; }
.plots svg { flex: 1 0 88px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
  min-width: 0; margin: 0; }
.card b { display: block; font-size: 1.45rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span, figcaption { color: var(--soft); font-size: .85rem; }
.card.bad { border-color: var(--bad); } .card.bad b { color: var(--bad); }
figcaption { display: flex; justify-content: space-between; gap: 1rem; }
figcaption strong { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: 88px; margin: .6rem 0 .25rem; fill: var(--accent);
  border-bottom: 1px solid var(--line); }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .78rem;
  font-variant-numeric: tabular-nums; }
ol.bars { list-style: none; margin: .6rem 0 0; padding: 0; font-size: .88rem; }
ol.bars li { display: flex; justify-content: space-between; gap: 1rem; padding: .12rem .45rem; margin: .15rem 0;
  border-radius: 4px; background: linear-gradient(to right, var(--faint) var(--share), transparent var(--share)); }
ol.bars li i { font-style: normal; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
ol.bars li span { font-variant-numeric: tabular-nums; }
.pictures { gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.pictures figure { padding: 0; overflow: hidden; }
.pictures img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: light-dark(#eceff2, #0d0f12); }
.pictures div { padding: .6rem .8rem .8rem; overflow-wrap: anywhere; }
.pictures p { margin: .15rem 0; } .pictures small { color: var(--soft); }
details summary { cursor: pointer; color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { color: var(--soft); font-weight: 500; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""
