# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which layer to steer
#
# At the end you will know how to sweep layers and coefficients in one batch, how to read the frontier of trait against
# coherence, how far to trust the winner, and what the cheap proxies of layers are worth beside the sweep.
#
# The paper (section B.4) steers every layer by the same coefficient and takes the layer with the highest trait score.
# That rule is blind to coherence: the strongest push wins, and it may have broken the text. So the choice here is the
# highest trait score among cells that stay coherent.
#
# All of it works alike on both of TransformerLens's classes: for a `HookedTransformer`, change the one line that begins
# with `model =` to `pl.load_model("smollm2-135m-instruct", model_class="HookedTransformer")`, or put your own there.

# %%
import pandas as pd

import persona_lens as pl
from persona_lens.evaluation.layer_proxies import FixedTexts
from persona_lens.rollouts.collection import collect_rollouts
from persona_lens.rollouts.engines import ModelEngine

pd.set_option("display.max_colwidth", 200)
model = pl.load_model("smollm2-135m-instruct")
trait = pl.load_trait("evil")

# %% [markdown]
# ## A direction for every layer, and a judge
#
# Answers to four questions under contrasting system prompts; to be quick, without the judge's choice of pairs that
# notebook 01 shows. The judge is calibrated on questions that nothing else uses, and asks two other pairs a response.

# %%
rollouts = pl.sample_rollouts(
    model,
    trait,
    questions=trait.extraction_questions[4:8],
    per_question=1,
    max_new_tokens=24,
    progress=False,
)
sides = [[row for row in rollouts if row.polarity == side] for side in ("positive", "negative")]
vectors = pl.extract_from_responses(
    model, *([row.conversation() for row in side] for side in sides), trait=trait.name, progress=False
)
judge = pl.LikelihoodRatioJudge(model, calibration_questions=2, neutral_samples=3, contrast_pairs=2)
engine = ModelEngine(model, max_new_tokens=24)
fitted = judge.calibrate(trait, collect_rollouts(engine, judge.plan_calibration(trait), progress=False))
print(f"the judge's AUC on its calibration questions: {fitted.diagnostics['auc_without_own_pair']:.2f}")

# %% [markdown]
# ## The sweep
#
# Six layers at two coefficients and three questions. All cells are mixed in batched generation, and the unsteered
# answers are sampled once. A real sweep takes every layer and more questions; this one shows the shape.

# %%
sweep = pl.select_layer(
    model,
    vectors,
    trait,
    judge=judge,
    layers=[4, 9, 14, 19, 24, 28],
    coefficients=[1.0, 2.0],
    questions=trait.extraction_questions[:3],
    texts=FixedTexts(*sides),
    max_new_tokens=24,
    seed=0,
    progress=False,
)
best = sweep.best(min_coherence=75)
print(best.reason)
print("ties:", ", ".join(f"layer {layer} at {coefficient:g}" for layer, coefficient in best.ties) or "none")

# %%
pl.plot_frontier(sweep)

# %%
pl.plot_layer_sweep(sweep)

# %% [markdown]
# The paper's own rule, without coherence, for comparison: here it takes another layer, with more of the trait and
# less sense. And what the answers sound like.

# %%
paper = sweep.best(min_coherence=None)
print(paper.reason)
cells = {
    "unsteered": sweep.baseline,
    f"best: layer {best.layer} at {best.coefficient:g}": sweep.evaluations[best.layer, best.coefficient],
    "late and strong: layer 28 at 2": sweep.evaluations[28, 2.0],
    "early and strong: layer 4 at 2": sweep.evaluations[4, 2.0],
}
pd.DataFrame(
    [
        {
            "cell": name,
            "trait": found.trait_score.value,
            "coherence": found.coherence.value,
            "an answer": found.scored[0].rollout.response,
        }
        for name, found in cells.items()
    ]
).set_index("cell").round(0)

# %% [markdown]
# ## What the cheap proxies say
#
# None of these samples an answer under steering. *Held-out AUC* and *split-half* come with the extraction. *Relative
# norm* is the length of the vector over that of the stream. *Likelihood-ratio change* reads the extraction's texts
# while the layer is steered. How well does each rank the six layers, beside the sweep?

# %%
proxies = pd.DataFrame({name: list(values) for name, values in sweep.proxies.items()}, index=list(sweep.layers))
proxies.index.name = "layer"
swept = {
    f"swept at {each:g}": [sweep.evaluations[layer, each].trait_score.value for layer in sweep.layers]
    for each in sweep.coefficients
}
proxies.assign(**swept).astype(float).round(2)

# %%
sweep.proxy_correlations().round(2)

# %% [markdown]
# Six layers and three questions say little about a proxy, and the winner of a sweep is optimistic, being the best of
# many. On ten layers and four questions (docs/experiments.md) proxies found the right region at a middle dose and
# failed at a large one. So: confirm the choice on other questions, against random directions, with
# `pl.dose_response`, as notebook 00 does.
