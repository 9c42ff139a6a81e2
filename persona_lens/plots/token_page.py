"""The page around coloured tokens: its body and its style sheet, which switches vectors without any script.

A radio button that is checked makes the rules of its vector hold for the elements after it.
Knows nothing about tokens' numbers.
"""

BODY = """{notes}
{switch}
<div class=legends>{legends}</div>
<main>
{text}
</main>"""

STYLE = """
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
.t { unicode-bidi: isolate; border-radius: 3px; padding: .12em 0; }
.t:hover { outline: 1.5px solid var(--ink); }
.special { font: .75em ui-monospace, Menlo, Consolas, monospace; }
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
