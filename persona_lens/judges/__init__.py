"""Judges score how strongly a response shows a trait and how coherent it is, both from 0 to 100; and the keep rule.

A judge runs with every intervention suspended and adapters off, so that a measure never measures itself
(arXiv:2507.21509, sections 2.2 and B). A missing score is None, never 0.
"""
