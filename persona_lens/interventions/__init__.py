"""Interventions on the residual stream: values that say what to do, and contexts that attach them to a model.

`Steer`, `Ablate` and `Cap` are frozen and serialisable, each with a pure `apply`; `intervene`, and its sugar `steer`,
`ablate` and `cap`, attach them at the outputs of blocks and remove them again (arXiv:2507.21509, sections 3.2 and J).
Knows nothing about traits' texts, sampling or judging.
"""
