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
# # Quickstart
#
# At the end you will have a direction in the residual stream for a trait that you named in a word, you will know how
# good it is at each layer, and you will have steered a real chat model with it, both ways.
#
# Everything runs on the small model that comes in a data package, on one CPU core. The settings here are a taste:
# four questions where the paper takes twenty, one sample where it takes ten.

# %%
import tempfile
from pathlib import Path

import pandas as pd

import persona_lens as pl

pd.set_option("display.max_colwidth", 300)

# %%
model = pl.load_model("smollm2-135m-instruct")
trait = pl.load_trait("optimistic")
print(trait.description)
print(trait.system_prompt("positive", 0))
print(trait.system_prompt("negative", 0))

# %% [markdown]
# ## From a trait to its vectors
#
# One call samples answers under contrasting system prompts, judges them, keeps the pairs that show the contrast, and
# takes the difference in means of the residual stream at every layer. The judge is the model itself: how much likelier
# is an answer under the trait's positive system prompts than under its negative ones? To be quick, it asks two of the
# other pairs' prompts; all of them are the default.

# %%
judge = pl.LikelihoodRatioJudge(model, calibration_questions=2, contrast_pairs=2)
vectors = pl.extract_persona_vectors(
    model,
    trait,
    judge=judge,
    questions=trait.extraction_questions[:4],
    per_question=1,
    min_pairs=4,
    max_new_tokens=24,
    seed=0,
    progress=False,
)
vectors

# %% [markdown]
# ## How good is the direction of each layer?
#
# Held-out AUC: how well the projection tells both sides apart on questions that the direction was not made of. Beside
# it stand its controls: the words alone (the embedding row), and a placebo with the polarity swapped at random.

# %%
pl.plot_layer_statistics(vectors)

# %% [markdown]
# ## Steer
#
# A vector knows its layer, and adds itself to the residual stream inside a context, which leaves nothing behind.

# %%
vector = vectors.at(22)
question = trait.evaluation_questions[10]
ask = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": question}]


def answer():
    return pl.generate_text(model, [ask], max_new_tokens=24, temperature=0)[0]


texts = {0: answer()}
for coefficient in (-2.0, 2.0, 4.0):
    with pl.steer(model, vector, coefficient=coefficient, at="response"):
        texts[coefficient] = answer()
print(question)
pd.Series(texts, name="answer").sort_index().rename_axis("coefficient").to_frame()

# %% [markdown]
# ## Is that the direction, or any push?
#
# The same doses of random directions of equal norm are the control, and coherence is what steering costs: where it
# falls below 50 a point is hollow, and does not count. Three questions that neither the vectors nor the judge saw,
# so the intervals are wide.

# %%
response = pl.dose_response(
    model,
    vector,
    trait,
    judge=judge,
    coefficients=(-2.0, 2.0, 4.0),
    questions=trait.evaluation_questions[10:13],
    random=2,
    max_new_tokens=24,
    seed=0,
    progress=False,
)
pl.plot_dose_response(response)

# %%
print(f"slope: {response.slope()} points of trait score for each 1.0 of the coefficient")
print("random directions:", ", ".join(f"{each.value:.1f}" for each in response.random_slopes()))

# %% [markdown]
# ## Keep it
#
# One safetensors file, which knows what model it belongs to and is refused on an unrelated one.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "optimistic.safetensors"
    vectors.save(file)
    print(pl.PersonaVectors.load(file).check(model))

# %% [markdown]
# What these numbers are worth: a few questions and a model of 135 million parameters that judges itself. The next
# notebooks take the steps one by one: what the direction means (01), which layer (02), what else can be done with it
# (03), and what to do before training on data (05, 06).
