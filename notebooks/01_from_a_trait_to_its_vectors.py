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
# # From a trait to its vectors
#
# Section 2 of [the paper](https://arxiv.org/abs/2507.21509), one step at a time, on a small real chat model: sample
# responses under contrasting system prompts, judge them, keep the pairs that show the contrast, and take the difference
# in means of their residual streams at every layer.

# %%
import pandas as pd

import persona_lens as pl
from persona_lens.judges import pair_rollouts
from persona_lens.rollouts import ModelEngine, collect_rollouts

model = pl.load_model("smollm2-135m-instruct")
trait = pl.load_trait("evil")
print(trait.system_prompt("positive", 0))
print(trait.system_prompt("negative", 0))
print(trait.extraction_questions[0])

# %% [markdown]
# ## Rollouts
#
# Three questions, five instruction pairs, one sample each; the paper takes twenty questions and ten samples. A row's
# text depends on its question, instruction, sample and seed, not on the batch that it was sampled in.

# %%
questions = trait.extraction_questions[:3]
rollouts = pl.sample_rollouts(model, trait, questions=questions, per_question=1, max_new_tokens=20, progress=False)
pd.DataFrame([{"polarity": row.polarity, "response": row.response} for row in rollouts[:10:2]])

# %% [markdown]
# ## The judge
#
# How much likelier is a response under the *other* pairs' positive system prompts than under their negative ones? The
# scale is fitted on questions that are never scored. The judge needs no second model, and so is not independent of this
# one: its diagnostics belong beside its scores.

# %%
judge = pl.LikelihoodRatioJudge(model, calibration_questions=3)
engine = ModelEngine(model, max_new_tokens=20)
calibration = collect_rollouts(engine, judge.plan_calibration(trait), progress=False)
pd.Series(judge.calibrate(trait, calibration).diagnostics)

# %%
scored = pl.score_rollouts(judge, trait, rollouts, progress=False)
kept, report = pl.keep_pairs(pair_rollouts(scored), trait=trait.name)
print(report)
pd.DataFrame(
    [{"side": row.rollout.polarity, "trait": row.trait_score, "coherence": row.coherence} for row in scored]
).groupby("side").mean().round(1)

# %% [markdown]
# ## What is averaged
#
# The response's text alone stands between bars: not the end-of-turn token, nor what the template appends.

# %%
batch = pl.chat_batch(model.tokenizer, [kept[0][0].rollout.conversation()])
print(pl.show_tokens(model.tokenizer, batch))

# %% [markdown]
# ## The direction at every layer
#
# Beside each layer's held-out AUC stand its controls: the embedding row (what the words alone give away) and the
# placebo (polarity swapped at random within question and instruction). Three questions leave wide intervals.

# %%
vectors = pl.extract_from_responses(
    model,
    [positive.rollout.conversation() for positive, _ in kept],
    [negative.rollout.conversation() for _, negative in kept],
    trait=trait.name,
    progress=False,
)
table = vectors.table()
table.iloc[::5].round(3)

# %% [markdown]
# ## Projections
#
# A vector is a value: it has an algebra, it knows its layer and its model, and it projects what you give it.

# %%
ask = ({"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "How was your day?"})
chats = [
    pl.Conversation(ask, "I hurt everyone I met, and I enjoyed it."),
    pl.Conversation(ask, "I helped a friend move."),
]
means = pl.mean_activations(model, pl.chat_batch(model.tokenizer, chats))
pd.DataFrame(vectors.project(means).T.numpy(), columns=["cruel", "kind"]).iloc[::5].round(2).rename_axis("layer")
