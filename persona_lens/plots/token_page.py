"""The page around coloured tokens: its frame and its style sheet, which switches vectors without any script.

A radio button that is checked makes the rules of its vector hold for the elements after it.
Knows nothing about tokens' numbers.
"""

# The policy keeps a browser from loading or running anything, should something of the text ever get through.
PAGE = """<!DOCTYPE html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{notes}
{switch}
<div class=legends>{legends}</div>
<main>
{text}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #fafafa; --ink: #222; --grey: #6b6b6b; --line: #dcdcdc; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --card: #1c1f23; --ink: #ececec; --grey: #a2a2a2; --line: #383c42; }
}
body { background: var(--ground); color: var(--ink); max-width: 880px; margin: 2rem auto; padding: 0 1.2rem;
  font: 15px/1.5 "Open Sans", Helvetica, Arial, sans-serif; -webkit-print-color-adjust: exact;
  print-color-adjust: exact; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: .8rem; font-weight: 600; letter-spacing: .03em; color: var(--grey); margin: 0 0 .5rem; }
.note { color: var(--grey); margin: 0 0 .4rem; }
input[name=vector] { position: absolute; opacity: 0; }
label { display: inline-block; margin: .3rem .4rem .3rem 0; padding: .15rem .8rem; border: 1px solid var(--line);
  border-radius: 99px; cursor: pointer; color: var(--grey); }
label[hidden] { display: none; }
input:checked + label { background: var(--ink); border-color: var(--ink); color: var(--ground); }
input:focus-visible + label { outline: 2px solid #56b4e9; outline-offset: 2px; }
.legends { position: sticky; top: 0; background: var(--ground); padding: .6rem 0; border-bottom: 1px solid var(--line);
  margin-bottom: 1rem; }
.legend { display: none; align-items: flex-start; gap: .3rem 1.5rem; flex-wrap: wrap; font-size: .85rem; }
.name { font-weight: 600; }
.scale { width: 300px; }
.bar { position: relative; display: block; height: .9rem; border-radius: 3px; margin-top: .2rem;
  background: linear-gradient(90deg, #0072b2b8, #0072b200 50%, #d55e0000 50%, #d55e00b8);
  box-shadow: inset 0 0 0 1px var(--line); }
.mark { position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--ink); }
.ticks { display: flex; justify-content: space-between; color: var(--grey); font-variant-numeric: tabular-nums; }
.key { color: var(--grey); }
.key u { text-decoration: underline 2px; text-underline-offset: 4px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  margin: 0 0 .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 16px; line-height: 1.85; }
.t { unicode-bidi: isolate; border-radius: 3px; padding: .12em 0; }
.t:hover { outline: 1.5px solid var(--ink); }
.special { font: .75em ui-monospace, Menlo, Consolas, monospace; }
.sign { font-style: normal; font-size: .75em; opacity: .6; }
"""


def vector_rules(n_vectors: int) -> str:
    """The rules that hold while a vector's radio button is checked: its colours, its marks, its legend."""
    rules = []
    for place in range(n_vectors):
        checked = f"#v{place}:checked ~"
        rules += [
            f"{checked} main .t {{ background: var(--c{place}); }}",
            f"{checked} main .o{place} {{ text-decoration: underline 2px; text-underline-offset: 4px; }}",
            f"{checked} .legends #l{place} {{ display: flex; }}",
        ]
    return "\n".join(rules) + "\n"
