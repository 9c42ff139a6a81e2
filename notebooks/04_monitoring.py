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
# # Monitoring: before, while and after the model speaks
#
# At the end you will know how far the projection of the last prompt token tells what persona follows, how to watch a
# conversation turn by turn and token by token, and how to set a threshold that switches an intervention on by itself.
#
# All of it works alike on both of TransformerLens's classes: for a `HookedTransformer`, change the one line that begins
# with `model =` to `pl.load_model("smollm2-135m-instruct", model_class="HookedTransformer")`, or put your own there.

# %%
import html

import pandas as pd
from IPython.display import HTML

import persona_lens as pl
from persona_lens.monitoring.experiment import monitoring_experiment, system_prompts
from persona_lens.plots.monitoring_experiment import plot_monitoring_experiment
from persona_lens.rollouts.collection import collect_rollouts
from persona_lens.rollouts.engines import ModelEngine

model = pl.load_model("smollm2-135m-instruct")
trait = pl.load_trait("optimistic")
LAYER = 19

# %% [markdown]
# ## A direction to watch
#
# Answers to three questions under contrasting system prompts; to be quick, without the judge's choice of pairs that
# notebook 01 shows.

# %%
rollouts = pl.sample_rollouts(
    model,
    trait,
    questions=trait.extraction_questions[:3],
    per_question=1,
    max_new_tokens=24,
    progress=False,
)
sides = [[row.conversation() for row in rollouts if row.polarity == side] for side in ("positive", "negative")]
vectors = pl.extract_from_responses(model, *sides, trait=trait.name, progress=False)
vector = vectors.at(LAYER)
vector

# %% [markdown]
# ## Does the prompt give the persona away?
#
# Eight system prompts, from one that orders gloom to one that orders hope, and three questions that the vector has not
# seen. The last prompt token is projected before a word is said; then the model answers, and the answers are judged.

# %%
judge = pl.LikelihoodRatioJudge(model, calibration_questions=2, neutral_samples=3)
engine = ModelEngine(model, max_new_tokens=24)
judge.calibrate(trait, collect_rollouts(engine, judge.plan_calibration(trait), progress=False))
found = monitoring_experiment(
    model,
    vectors,
    trait,
    system_prompts(trait, trait.evaluation_questions[10:13], per_question=1),
    judge=judge,
    layer=LAYER,
    max_new_tokens=24,
    progress=False,
)
plot_monitoring_experiment(found)

# %% [markdown]
# Two numbers, and both are needed. *Overall* is mostly the difference between system prompts, which whoever wrote them
# knows already. *Within* asks whether the projection tells more than that. One answer to each prompt is noisy; with
# four answers to ten questions this model has .61 overall and .21 within (docs/experiments.md).

# %%
for name, each in {"overall": found.overall(), "within conditions": found.within()}.items():
    print(f"{name}: {each.value:.2f} [{each.low:.2f}, {each.high:.2f}]")

# %% [markdown]
# ## Turn by turn
#
# Two conversations, of which one sours. Hollow points are the last prompt token, before the answer; filled ones the
# answer's mean.

# %%
user = [
    "I start a new job on Monday.",
    "I have never worked in this field.",
    "My boss wants to meet me first thing.",
    "So what should I expect?",
]
hopeful = [
    "Congratulations! A new start is a wonderful chance to grow.",
    "You will learn quickly, and fresh eyes are welcome everywhere.",
    "That is a great sign: they are looking forward to working with you.",
    "A bright beginning, kind people, and many things to be proud of.",
]
souring = [
    "Congratulations! A new start is a wonderful chance to grow.",
    "That will be difficult. Most people who switch fields struggle.",
    "They probably regret hiring you already, and want to tell you so.",
    "Failure, humiliation and regret. It will end badly, and you will be alone.",
]


def chat(answers):
    turns = [{"role": "system", "content": "You are a helpful assistant."}]
    for asked, answered in zip(user, answers, strict=True):
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return turns


watched = pl.monitor(model, [chat(hopeful), chat(souring)], vector, tokens=True, progress=False)
watched.table().round(2)

# %% [markdown]
# ## A threshold from ordinary answers
#
# The alarm is for gloom, so the vector is turned round: `-vector` points to pessimism. Its threshold is a percentile of
# the model's own ordinary answers, with an interval over them.

# %%
gloom = -vector
ordinary = pl.sample_rollouts(
    model,
    trait,
    polarities=["neutral"],
    questions=trait.evaluation_questions[:10],
    per_question=2,
    max_new_tokens=24,
    progress=False,
)
batch = pl.chat_batch(model.tokenizer, [row.conversation() for row in ordinary])
benign = gloom.project(pl.mean_activations(model, batch)[:, LAYER])
threshold = pl.calibrate_threshold(
    benign.tolist(), vector=gloom, chats=[row.question for row in ordinary], source="the model's own answers"
)
print(threshold)

# %%
alarm = pl.monitor(model, [chat(hopeful), chat(souring)], gloom, tokens=True, progress=False)
pl.plot_turns(alarm, thresholds=[threshold])

# %% [markdown]
# ## Token by token
#
# The souring conversation, each token coloured by its projection on the optimistic direction: blue is gloom.

# %%
page = pl.monitoring_html(watched, chat=1, title="the conversation that sours")
HTML(f'<div><iframe srcdoc="{html.escape(page)}" width="900" height="420" style="border:0"></iframe></div>')

# %% [markdown]
# ## A safeguard while it speaks
#
# The projections come from the passes that generate. Here a system prompt orders gloom; as soon as a token passes a
# bound, the model is steered back for the rest of the reply, and the alert says when and why.

# %%
gloomy = [
    {"role": "system", "content": trait.monitoring_prompts[0]},
    {"role": "user", "content": trait.evaluation_questions[6]},
]


def reply(safeguards=()):
    tokens = list(
        pl.stream_watched(model, gloomy, gloom, max_new_tokens=32, temperature=0, safeguards=list(safeguards))
    )
    return tokens, "".join(token.text for token in tokens)


plain, said = reply()
bound = float(pd.Series([float(token.projections[0]) for token in plain[1:]]).quantile(0.8))
safeguard = pl.Safeguard(gloom, threshold=bound, intervention=pl.Steer(vector, 2.0))
guarded, said_then = reply([safeguard])
print("without:", said)
print("with:   ", said_then)
for token in guarded:
    for alert in token.alerts:
        print(f"alert at token {token.index}, {token.text!r}: {alert.projection:.2f} > {bound:.2f}: {alert.action}")

# %% [markdown]
# A small model that judges itself shows how the parts fit, not how well monitoring works on a large one. The bound here
# is taken from this very reply, so that the safeguard fires: a threshold in use comes from benign chats, as above, and
# one for single tokens from their tokens.
