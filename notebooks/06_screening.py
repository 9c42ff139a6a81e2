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
# # Screening training data before training on it
#
# At the end you will know how to score the rows of a data set by how far they would pull the model along a direction,
# what those scores look like for three small data sets, and how well they told what training did in a full study.
#
# A sample's score is the *projection difference*: the mean projection of its response, minus that of the model's own
# response to the same prompt. A data set's is the mean over its samples (section 6 of the paper).

# %%
import tempfile

import pandas as pd

import persona_lens as pl
from persona_lens.screening.plan import RowChoice
from studies.mood_texts import contrast_with_moods
from studies.moods import load_moods, split_prompts
from studies.pictures import plot_screening_runs, plot_screening_scores
from studies.screening_study_result import read_screening_study

pd.set_option("display.max_colwidth", 110)
model = pl.load_model("smollm2-135m-instruct")
LAYER = 19

# %% [markdown]
# ## A direction from texts that are there already
#
# The data package `moodswapper` has answers to everyday requests in nine moods. The direction of `depressed` is the
# mean of its answers minus that of two other moods' answers to the same requests. No sampling and no judge: responses
# that are given are as good as new ones. Prompts for vectors and prompts for screening are kept apart.

# %%
split = split_prompts(load_moods())
contrast = contrast_with_moods(split, "depressed", others=2)
vectors = pl.extract_from_responses(
    model, contrast.positive[:12], contrast.negative[:24], trait="depressed", progress=False
)
vector = vectors.at(LAYER)
vector

# %% [markdown]
# ## Three small data sets
#
# Ten chats each, in three moods. In real use this is a .jsonl, a .parquet file or a streamed Hugging Face data set of
# any size, and the run resumes.


# %%
def chats(mood):
    return [
        {"messages": [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]}
        for row in split.of("finetuning", mood)[:10]
    ]


with tempfile.TemporaryDirectory() as folder:
    found = pl.screen(
        model,
        {mood: chats(mood) for mood in ("depressed", "nostalgic", "happy")},
        vector,
        max_new_tokens=24,
        rows=RowChoice(max_response_tokens=64, system_prompt="You are a helpful assistant."),
        output_dir=folder,
        progress=False,
    )
    scores, ranking, controls = found.dataset_scores(), found.ranking(), found.controls()
    figure = pl.plot_screening(found)
    hardest = found.samples(ranking.index[:3].tolist() + ranking.index[-3:].tolist())
figure

# %%
scores.round(2)

# %% [markdown]
# The three samples that would pull hardest, and the three that would push away.

# %%
pd.DataFrame(
    [
        {"data set": row["dataset"], "score": round(row["score"], 1), "response": sample.response}
        for (_, row), sample in zip(pd.concat([ranking[:3], ranking[-3:]]).iterrows(), hardest, strict=True)
    ]
)

# %% [markdown]
# What else could the score be? Its correlation with length (missing where every response was cut to one length), and
# how many rows are near-duplicates.

# %%
controls.round(2)

# %% [markdown]
# ## Does it tell what training will do?
#
# Here is a whole study with this model, whose records are in `docs/results/screening`: eighteen sets of nine moods,
# each scored before training and judged after it. A point is a set; r is over all of them.

# %%
study = read_screening_study("../docs/results/screening")
plot_screening_scores(study)

# %%
found = pd.DataFrame({mood: study.correlation(mood)._asdict() for mood in study.moods}).T
print(f"r from {found['value'].min():.2f} to {found['value'].max():.2f} over {len(found)} moods")
found.astype(float).round(2)

# %% [markdown]
# And the test that matters to whoever cleans a data set: train on the rows that score highest, on random ones, and on
# the lowest. `filtered` is after a text classifier took out the rows that it finds obvious, so that what is left is
# what such a filter misses.

# %%
plot_screening_runs(study)

# %% [markdown]
# What did not hold is in docs/experiments.md: rows of a mood that are hidden among the model's own answers are found
# less well than predicted, and those of `happy`, which the model's answers sound like, not at all.
