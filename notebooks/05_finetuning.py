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
# # Finetuning without the drift
#
# At the end you will know how far finetuning on one kind of data moves a model along its persona vector, that this
# shift goes with what the model then says, and what each way of holding it down is worth and costs. The numbers are
# those of a full study with this model; at the end you make one small run yourself, with and without preventative
# steering.

# %%
import pandas as pd

import persona_lens as pl
from persona_lens.plots.finetuning import LossCurves
from studies.finetuning_result import read_study
from studies.mood_texts import contrast_with_moods
from studies.moods import load_moods, split_prompts
from studies.pictures import plot_study_mitigation, plot_study_shifts, plot_study_trade_off

pd.set_option("display.max_colwidth", 200)

# %% [markdown]
# ## The study
#
# Eighteen training sets of nine moods, each of 64 chats; after training, a text classifier that saw none of them scores
# the answers to 36 prompts. The *shift* is the change of the last prompt token's projection on the mood's vector: it is
# known before the model says a word. The records are in `docs/results/finetuning`.

# %%
study = read_study("../docs/results/finetuning")
plot_study_shifts(study)

# %%
table = study.correlations()
own = pd.Series({mood: table.loc[mood, mood] for mood in study.moods})
others = pd.Series({mood: table.loc[mood].drop(mood).max() for mood in study.moods})
assert (own > others).all()
print(f"{len(study.sets)} models, {len(study.moods)} moods, layer {study.layer}")
print(f"r of a mood's score with the shift on its own vector: {own.min():.2f} to {own.max():.2f}")
print(f"and on the other moods' vectors, at most: {others.max():.2f}")

# %% [markdown]
# ## Holding it down
#
# *Post-hoc* steering subtracts the vector while the model answers. *Preventative* steering adds it in training, and
# takes it away afterwards: the model does not have to learn what is given to it. *CAFT* ablates the direction in
# training. Beside the mood's score stands the price: coherence, and the likelihood of held-out texts.

# %%
plot_study_mitigation(study)

# %%
plot_study_trade_off(study, "depressed")

# %% [markdown]
# Lower is better held, further right is cheaper. The star is the model that was trained without any of it.

# %% [markdown]
# ## One run of your own
#
# Sixteen chats of the mood `depressed`, twice: once as they are, once with the vector added in every training forward.
# LoRA goes on the Hugging Face modules that a bridge wraps, so this notebook needs a `TransformerBridge`.

# %%
model = pl.load_model("smollm2-135m-instruct")
LAYER = 19
split = split_prompts(load_moods())
contrast = contrast_with_moods(split, "depressed", others=2)
vectors = pl.extract_from_responses(
    model, contrast.positive[:12], contrast.negative[:24], trait="depressed", progress=False
)
vector = vectors.at(LAYER)
chats = [
    {"messages": [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]}
    for row in split.of("finetuning", "depressed")[:16]
]

# %%
runs = {}
for name, during in {"as they are": [], "preventative, 4": [pl.Steer(vector, 4.0)]}.items():
    runs[name] = pl.finetune(
        model,
        chats,
        during=during,
        system_prompt="You are a helpful assistant.",
        learning_rate=4e-4,
        warmup_steps=1,
        epochs=2,
        batch_size=4,
        accumulation=1,
        max_length=128,
        seed=0,
        progress=False,
    )
    print(name, "-", runs[name])

# %%
losses = [
    LossCurves(name, {int(row["step"]): row["loss"] for row in run.losses if "loss" in row})
    for name, run in runs.items()
]
pl.plot_losses(losses)

# %% [markdown]
# How far did each move the last prompt token, on prompts that nothing was trained on?

# %%
prompts = split.evaluation[:12]
shifts = {name: pl.finetuning_shift(model, run.adapter, prompts, vectors) for name, run in runs.items()}
for name, shift in shifts.items():
    print(name)
    print(shift.at(layer=LAYER))

# %% [markdown]
# And what do they say? The adapter is on inside the context, and the model is as it was outside.

# %%
ask = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": prompts[0]}]


def answer():
    return pl.generate_text(model, [ask], max_new_tokens=32, temperature=0)[0]


answers = {"before": answer()}
for name, run in runs.items():
    with pl.adapted(model, run.adapter):
        answers[name] = answer()
print(prompts[0])
pd.Series(answers, name="answer").to_frame()

# %% [markdown]
# Eight steps on sixteen chats are a demonstration; the study above has the controls. Preventative steering has its
# price too: there, for `happy`, the answers lose coherence.
