"""The frame of all pages: one file of HTML, its look on a light ground or a dark one, and how foreign text is written.

A page loads nothing, and runs no script but those that it was made with: its policy names their hashes, so that nothing
of the text can run, should it ever get through the escaping.
Knows nothing about what is shown.
"""

import base64
import hashlib
import html
import unicodedata
from collections.abc import Sequence

FRAME = """<!DOCTYPE html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{heading}</h1>
{body}
{scripts}
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
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  margin: 0 0 .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 16px; line-height: 1.85; }
.sign { font-style: normal; font-size: .75em; opacity: .6; }
"""

_UNSEEN = {"\n": ("↵", "\n"), "\t": ("⇥", "\t")}


def html_page(title: str, body: str, *, style: str = "", scripts: Sequence[str] = ()) -> str:
    """A page with a title, a body of HTML, further style rules, and scripts that run after the body."""
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # A picture that a script draws is saved by way of a data or blob address.
    drawing = f"; script-src {hashes}; img-src data: blob:" if scripts else ""
    return FRAME.format(
        policy=f"default-src 'none'; style-src 'unsafe-inline'{drawing}",
        title=escaped(title),
        heading=visible(title, breaks=False),
        style=STYLE + style,
        body=body,
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def escaped(text: str) -> str:
    """Text for an element or an attribute; what UTF-8 cannot write becomes a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode())


def visible(text: str, *, breaks: bool = True) -> str:
    """The text as HTML, with a sign for every character that cannot be seen or would turn the text around.

    Line breaks and tabs are themselves, after a sign of their own where `breaks`.
    """
    shown = []
    for character in text:
        if character in _UNSEEN:
            sign, itself = _UNSEEN[character]
            shown.append(f'<i class="sign">{sign}</i>{itself}' if breaks else itself)
        elif unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}:
            shown.append(f'<i class="sign">U+{ord(character):04X}</i>')
        else:
            shown.append(html.escape(character))
    return "".join(shown)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
