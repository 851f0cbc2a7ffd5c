"""The style sheet of `report.html`, for light and dark screens."""

STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #fff; --ink: #1d1f23; --soft: #666b75;
  --rule: #e3e4e8; --right: #1a7f4b; --c1: #2f6fd0; --c2: #d9711c; --c3: #2a9d6f; --c4: #b5409b;
  --c5: #8a6d10; --c6: #5b5fc7; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171b; --card: #1d2026; --ink: #e4e6ea;
  --soft: #989ea9; --rule: #31353d; --right: #5fcf95; --c1: #6ea8ff; --c2: #ff9f57; --c3: #57cfa0;
  --c4: #e884d0; --c5: #d8b64a; --c6: #a3a6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--ground);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 14px; margin: 14px 0 8px; color: var(--soft); }
h4 { font-size: 11px; margin: 8px 0 1px; color: var(--soft); font-weight: 600; }
small { color: var(--soft); font-weight: 400; }
header dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0; }
header dt { color: var(--soft); font-size: 12px; }
header dd { margin: 0; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px; }
figure, article { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
figure { padding: 10px 8px 2px; }
figcaption { font-size: 13px; padding-left: 8px; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; }
svg text { font-size: 10px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.level { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
circle { fill: var(--c); }
.key { white-space: nowrap; margin-right: 8px; font-size: 12px; }
.key::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin-right: 4px; background: var(--c); }
.tables { display: flex; flex-wrap: wrap; gap: 18px 30px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { padding: 3px 12px 3px 0; border-bottom: 1px solid var(--rule); text-align: right; }
th:first-child, .plain td { text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-weight: 400; }
td:last-child { font-weight: 600; padding-right: 2px; }
.plain td { font-weight: 400; overflow-wrap: anywhere; }
.plain th { color: var(--soft); white-space: nowrap; vertical-align: top; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; }
article { padding: 10px; font-size: 13px; overflow-wrap: anywhere; }
article img { display: block; width: 100%; max-height: 180px; object-fit: contain; border-radius: 4px;
  image-rendering: auto; background: var(--ground); }
article ol { margin: 0; padding-left: 18px; }
article ol li:only-child { list-style: none; margin-left: -18px; }
article footer { color: var(--soft); font-size: 11px; margin-top: 8px; }
.right { color: var(--right); font-weight: 600; }
.right::after { content: " \\2713"; }
details { margin-top: 18px; border-top: 1px solid var(--rule); padding-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 12px/1.5 ui-monospace, monospace; }
"""
