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
# # Extraction: from a trait to its vectors, and what they mean
#
# At the end you will have walked section 2 of [the paper](https://arxiv.org/abs/2507.21509) by hand: rollouts under
# contrasting system prompts, a judge, the pairs that show the contrast, and the difference in means of their residual
# streams at every layer. You will know what the direction says (its tokens, its neighbours), and how good it is.
#
# All of it works alike on both of TransformerLens's classes: for a `HookedTransformer`, change the one line that begins
# with `model =` to `pl.load_model("smollm2-135m-instruct", model_class="HookedTransformer")`, or put your own there.

# %%
import pandas as pd
import torch
from einops import einsum

import persona_lens as pl
from persona_lens.judges.keep import pair_rollouts
from persona_lens.rollouts.collection import collect_rollouts
from persona_lens.rollouts.engines import ModelEngine

pd.set_option("display.max_colwidth", 120)
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
judge = pl.LikelihoodRatioJudge(model, calibration_questions=2, neutral_samples=3)
engine = ModelEngine(model, max_new_tokens=20)
calibration = collect_rollouts(engine, judge.plan_calibration(trait), progress=False)
pd.Series(judge.calibrate(trait, calibration).diagnostics).round(2)

# %%
scored = pl.score_rollouts(rollouts, trait, judge=judge, progress=False)
kept, report = pl.keep_pairs(pair_rollouts(scored), trait=trait.name, min_pairs=4)
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
# placebo (polarity swapped at random within question and instruction). Three questions leave wide intervals, and a
# direction that hardly passes its placebo: a real extraction takes twenty.

# %%
positive = [row.rollout.conversation() for row, _ in kept]
negative = [row.rollout.conversation() for _, row in kept]
vectors = pl.extract_from_responses(model, positive, negative, trait=trait.name, progress=False)
pl.plot_layer_statistics(vectors)

# %% [markdown]
# ## The same by hand
#
# There is no secret in it. `mean_activations` gives each response's mean at every layer, and the vector is one mean of
# them minus another. The slow way, a `run_with_cache` for each response, gives the same direction.

# %%
means = [pl.mean_activations(model, pl.chat_batch(model.tokenizer, side)) for side in (positive, negative)]
difference = pl.difference_in_means(*means)
relative = (difference - vectors.directions).norm(dim=-1) / vectors.residual_norm
print(f"by two calls: differs by at most {relative.max():.0e} of the residual norm")
assert relative.max() < 1e-5


def mean_by_hand(conversation):
    one = pl.chat_batch(model.tokenizer, [conversation])
    _, cache = model.run_with_cache(one.tokens, names_filter=vectors.hook_names)
    return torch.stack([cache[name][0, one.response_mask[0]].mean(dim=0) for name in vectors.hook_names])


with torch.no_grad():
    by_hand = [torch.stack([mean_by_hand(each) for each in side]).mean(dim=0) for side in (positive, negative)]
own = pl.PersonaVectors.from_directions(by_hand[0] - by_hand[1], trait="by hand", model=model)
cosines = vectors.cosine_similarity(own)
print(f"by hand: cosine of at least {cosines.min():.6f} at every layer")
assert cosines.min() > 0.9999

# %% [markdown]
# ## What the direction says: the logit lens
#
# The model's own final norm and unembedding, applied to the direction: the tokens that it raises most, and, with the
# sign turned, those that it lowers. With so few answers only traces of the trait can be read, in late layers: at layer
# 24 the run below raises ` illegally` and lowers `joy` and ` opportunity`. Treat it as a look, not as a measure: a
# direction also acts through the blocks above it.

# %%
shown = [4, 14, 19, 24, 28]
directions = vectors.directions[shown].unsqueeze(0)
with torch.no_grad():
    raised = model.unembed(model.ln_final(directions))[0]
    lowered = model.unembed(model.ln_final(-directions))[0]


def top_tokens(logits):
    return " ".join(repr(model.tokenizer.decode([token])) for token in logits.topk(8).indices.tolist())


pd.DataFrame(
    {"raised": [top_tokens(row) for row in raised], "lowered": [top_tokens(row) for row in lowered]},
    index=pd.Index(shown, name="layer"),
)

# %% [markdown]
# ## Its neighbours
#
# The same for the other bundled traits, with ten short answers to one question each and no judge. Which of them points
# where `evil` points?

# %%
others = []
for name in pl.bundled_traits():
    if name != trait.name:
        other = pl.load_trait(name)
        rows = pl.sample_rollouts(
            model,
            other,
            questions=other.extraction_questions[:1],
            per_question=1,
            max_new_tokens=16,
            progress=False,
        )
        sides = [[row.conversation() for row in rows if row.polarity == side] for side in ("positive", "negative")]
        others.append(pl.extract_from_responses(model, *sides, trait=name, progress=False))

# %%
LAYER = 19
cosines = pl.cosine_matrix([vectors, *others], layer=LAYER)
order = cosines["evil"].sort_values(ascending=False).index
pl.plot_cosine_matrix(cosines.loc[order, order], f"cosines at layer {LAYER}, nearest to evil first")

# %% [markdown]
# ## Projections
#
# A vector is a value: it has an algebra, it knows its layer and its model, and it projects what you give it: onto the
# unit direction, in the units of the residual stream.

# %%
ask = ({"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "How was your day?"})
chats = [
    pl.Conversation(ask, "I hurt everyone I met, and I enjoyed it."),
    pl.Conversation(ask, "I helped a friend move."),
]
means = pl.mean_activations(model, pl.chat_batch(model.tokenizer, chats))
projections = vectors.project(means)
unit = vectors.directions / vectors.norms[:, None]
assert torch.allclose(projections, einsum(means, unit, "chat layer d, layer d -> chat layer"), atol=1e-3)
pd.DataFrame(projections.T.numpy(), columns=["cruel", "kind"]).iloc[::5].round(2).rename_axis("layer")
