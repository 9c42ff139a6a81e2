"""The look of a screening's page, beyond its parts, and its last paragraph.

Knows nothing about a screening's numbers.
"""

SCREENING_STYLE = """
.end { margin: 1.4rem 0 .5rem; }
.next p { margin: 0; }
@media (max-width: 820px) {
  thead { display: none; }
  tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  td, td:first-child { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  td::before { content: attr(data-name); color: var(--grey); font-weight: 400; white-space: nowrap; }
}
"""

NEXT = """<p>Read the samples above before the means: a score says how far a response lies along the vector, and not
whether the response is bad. In the run’s folder <code>{folder}</code>, <code>rejects.jsonl</code> lists what was
rejected (here {rejected}) with the reasons, to be mended at the source, and <code>scores.parquet</code> has a row for
each sample with its projections, to be filtered or joined by data set, id and line. To see what the scores mean for
training, finetune on the ends: <code>write_split(read_screening(folder), "split", 1000, vector={vector},
by="{by}")</code> writes the 1,000 highest, random and lowest samples as three files of chats, and of near-duplicates
only the first.</p>"""
