"""Rollouts: responses to a trait's questions under positive, negative and neutral system prompts.

A model in this process or a server gives them, and a file keeps them, so that an interrupted run resumes
(arXiv:2507.21509, section 2.2).
"""
