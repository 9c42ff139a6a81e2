"""A run's folder as one page of HTML: what was found, how sure that is, and the texts behind it.

`read_run` reads whatever the folder holds, `report_html` makes the page of it, `write_report` does both and writes it.
A page needs nothing from outside and shows all foreign text letter for letter; what a folder lacks is said, with the
command that makes it.
Knows nothing about models: only files of results are read.
"""

from persona_lens.report.findings import findings
from persona_lens.report.page import report_html, write_report
from persona_lens.report.replication import replication_html, write_replication_report
from persona_lens.report.run import Run, read_run

__all__ = ["Run", "findings", "read_run", "replication_html", "report_html", "write_replication_report", "write_report"]
