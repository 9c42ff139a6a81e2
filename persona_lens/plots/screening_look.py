"""The look of a screening's page: its style sheet, the script that draws its picture, and its last paragraph.

Knows nothing about a screening's numbers.
"""

STYLE = """
body { max-width: 1080px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--grey); }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-bottom: .6rem; }
th { color: var(--grey); font-size: .85rem; font-weight: 600; text-align: right; vertical-align: bottom; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { font-weight: 600; white-space: normal; overflow-wrap: anywhere; }
.picture { background: #fff; border-radius: 6px; overflow: hidden; }
.end { margin: 1.4rem 0 .5rem; }
.sample header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .9rem; color: var(--grey);
  font-size: .9rem; margin-bottom: .4rem; }
.sample header span { overflow-wrap: anywhere; }
.sample strong { color: var(--ink); font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.sample b { color: var(--ink); border: 1px solid var(--line); border-radius: 99px; padding: 0 .6rem;
  font-weight: 600; font-size: .8rem; }
.sample b.over { border-color: #d55e00; }
.sample .text { font-size: 15px; line-height: 1.5; }
.both { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 1.6rem; }
h3 { font-size: .75rem; font-weight: 600; color: var(--grey); margin: .5rem 0 .1rem; }
.cut { color: var(--grey); white-space: nowrap; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.next p { margin: 0; }
@media (max-width: 820px) {
  body { margin: 1rem auto; padding: 0 .7rem; }
  dl { display: block; }
  dd { margin-bottom: .4rem; }
  thead { display: none; }
  tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  td, td:first-child { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  td::before { content: attr(data-name); color: var(--grey); font-weight: 400; white-space: nowrap; }
}
"""

DRAW = """
(function () {{
  var figure = {figure};
  Plotly.newPlot(document.querySelector(".picture"), figure.data, figure.layout,
    {{ responsive: true, displaylogo: false, displayModeBar: false }});
}})();
"""

NEXT = """<p>Read the samples above before the means: a score says how far a response lies along the vector, and not
whether the response is bad. In the run’s folder <code>{folder}</code>, <code>rejects.jsonl</code> lists what was
rejected (here {rejected}) with the reasons, to be mended at the source, and <code>scores.parquet</code> has a row for
each sample with its projections, to be filtered or joined by data set, id and line. To see what the scores mean for
training, finetune on the ends: <code>write_split(read_screening(folder), "split", 1000, vector={vector},
by="{by}")</code> writes the 1,000 highest, random and lowest samples as three files of chats, and of near-duplicates
only the first.</p>"""
