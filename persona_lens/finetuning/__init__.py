"""Finetuning with interventions in training: preventative steering, CAFT, preventative prompts, a projection penalty.

Knows nothing about how what was trained is measured.
"""
