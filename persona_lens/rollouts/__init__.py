"""Rollouts: a model's answers to a trait's questions under positive, negative and neutral system prompts.

They come from a model in this process or from a server, and go into a file from which an interrupted run goes on
(arXiv:2507.21509, section 2.2).
Knows nothing about scores or activations.
"""
