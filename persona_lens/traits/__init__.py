"""Traits: the words that define a persona, bundled or written by an LLM."""
