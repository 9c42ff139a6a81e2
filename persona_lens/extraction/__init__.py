"""From contrasting responses to persona vectors (arXiv:2507.21509, section 2.2)."""
