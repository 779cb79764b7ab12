"""How a gallery page looks; in Python, because a wheel of this project carries no other files."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f5f2; --card: #ffffff; --line: #e4e1da; --mat: #efede8;
  --ink: #1d1c1a; --soft: #6d6a63; --accent: #0f766e; --track: #e4e1da; --minus: #b42318;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --card: #1c1e21; --line: #2c2f34; --mat: #24272b;
    --ink: #eceae6; --soft: #9a9890; --accent: #2dd4bf; --track: #31353b; --minus: #f97066;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 1500px;
  background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; font-weight: 650; letter-spacing: -0.02em; overflow-wrap: anywhere; }
.facts { margin: 0.3rem 0 0; color: var(--soft); font-size: 0.85rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 0.5rem; margin-top: 1.1rem; font-size: 0.88rem; }
nav a {
  padding: 0.25rem 0.75rem; border: 1px solid var(--line); border-radius: 999px;
  background: var(--card); color: var(--ink); text-decoration: none; overflow-wrap: anywhere;
}
nav a:hover { border-color: var(--accent); color: var(--accent); }
section { margin-top: 2.2rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
.question { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem; margin: 0; font-size: 1.15rem; }
.term { display: inline-flex; align-items: center; gap: 0.4rem; font-weight: 600; overflow-wrap: anywhere; }
.term img { display: block; height: 4.5rem; border-radius: 8px; border: 1px solid var(--line); }
.sign { color: var(--soft); font-weight: 400; }
.minus .sign, .minus .text { color: var(--minus); }
.weight { color: var(--soft); font-weight: 400; font-size: 0.85rem; }
.took { margin: 0.3rem 0 1.1rem; color: var(--soft); font-size: 0.82rem; }
.hits {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); gap: 1rem;
  margin: 0; padding: 0; list-style: none;
}
.hit {
  display: flex; flex-direction: column; overflow: hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
}
.picture { aspect-ratio: 1; display: grid; place-items: center; background: var(--mat); overflow: hidden; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.missing { padding: 1.2rem; color: var(--soft); font-size: 0.82rem; text-align: center; overflow-wrap: anywhere; }
.score { display: flex; align-items: center; gap: 0.6rem; padding: 0.65rem 0.8rem 0; }
.rank { color: var(--soft); font-size: 0.8rem; min-width: 1.1rem; }
.track { flex: 1; height: 5px; border-radius: 3px; background: var(--track); overflow: hidden; }
.track span { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.value { font-size: 0.85rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.caption {
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5; line-clamp: 5; overflow: hidden;
  margin: 0.45rem 0.8rem 0; overflow-wrap: anywhere;
}
.note { margin: 0.3rem 0.8rem 0; color: var(--soft); font-size: 0.85rem; }
details { padding: 0.3rem 0.8rem 0; color: var(--soft); font-size: 0.85rem; }
summary { cursor: pointer; }
details ul { margin: 0.3rem 0 0; padding-left: 1.1rem; }
.key {
  margin: auto 0 0; padding: 0.6rem 0.8rem 0.75rem; color: var(--soft);
  font: 0.75rem/1.3 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
}
.none { color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: 0.8rem; }
@media print { body { padding: 0; } .hit { break-inside: avoid; } }
"""
