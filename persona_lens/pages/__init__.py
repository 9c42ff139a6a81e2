"""Self-contained HTML pages of results, from Jinja2 templates: runs, screenings, and texts with coloured tokens."""

from persona_lens.pages.run_report import write_report
from persona_lens.pages.screening import screening_html
from persona_lens.pages.tokens import monitoring_html, tokens_html

__all__ = ["monitoring_html", "screening_html", "tokens_html", "write_report"]
