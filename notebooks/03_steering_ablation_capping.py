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
# # Steering, ablation and capping, compared layer by layer
#
# At the end you will know what each of the three does to the residual stream, below and above the layer where it acts,
# at which layer each does the most for the trait, and what each costs.
#
# - **Steering** adds a multiple of the direction to every token.
# - **Ablation** takes the component along the direction out.
# - **Capping** holds the projection at or below a bound, and leaves tokens alone that are within it.
#
# All three are values (`pl.Steer`, `pl.Ablate`, `pl.Cap`) that a context attaches. They work alike on both of
# TransformerLens's classes: for a `HookedTransformer`, change the one line that begins with `model =` to
# `pl.load_model("smollm2-135m-instruct", model_class="HookedTransformer")`, or put your own there.

# %%
import pandas as pd
import plotly.graph_objects as go

import persona_lens as pl
from persona_lens.chat import tokenize_chat
from persona_lens.plots import plot_layer_estimates
from persona_lens.statistics import mean_estimate

pd.set_option("display.max_colwidth", 200)
model = pl.load_model("smollm2-135m-instruct")
trait = pl.load_trait("optimistic")

# %% [markdown]
# ## A direction to work with
#
# Answers to three questions under five pairs of contrasting system prompts. To be quick, no judge drops the pairs that
# fail to show the contrast: notebook 01 shows that step.

# %%
rollouts = pl.sample_rollouts(
    model,
    trait,
    questions=trait.extraction_questions[:3],
    per_question=1,
    max_new_tokens=24,
    seed=0,
    progress=False,
)
sides = {side: [row for row in rollouts if row.polarity == side] for side in ("positive", "negative")}
vectors = pl.extract_from_responses(
    model,
    [row.conversation() for row in sides["positive"]],
    [row.conversation() for row in sides["negative"]],
    trait=trait.name,
    progress=False,
)
vectors

# %% [markdown]
# ## What they do to the stream
#
# The same texts run through the model under each intervention, and every layer is projected on its own direction. The
# texts are answers to other questions under a neutral system prompt, so nothing here was fitted to them.

# %%
neutral = pl.sample_rollouts(
    model,
    trait,
    polarities=["neutral"],
    questions=trait.evaluation_questions[:4],
    per_question=1,
    max_new_tokens=24,
    seed=1,
    progress=False,
)
batch = pl.chat_batch(model.tokenizer, [row.conversation() for row in neutral])
plain = vectors.project(pl.mean_activations(model, batch))

LAYER = 14
bound = float(plain[:, LAYER].mean()) - 1.0
done = {
    f"steer layer {LAYER} by 2": [pl.Steer(vectors.at(LAYER), 2.0)],
    f"ablate layer {LAYER}": [pl.Ablate(vectors.at(LAYER))],
    "ablate every layer": [pl.Ablate(vectors)],
    f"cap layer {LAYER} at {bound:.1f}": [pl.Cap(vectors.at(LAYER), maximum=bound)],
}
projections = {"nothing": plain}
for name, interventions in done.items():
    with pl.intervene(model, *interventions):
        projections[name] = vectors.project(pl.mean_activations(model, batch))

# %%
questions = [row.question for row in neutral]
plot_layer_estimates(
    {name: [mean_estimate(column.tolist(), questions) for column in values.T] for name, values in projections.items()},
    title="what each intervention leaves of the direction, layer by layer",
    upward="mean projection of the answers",
)

# %% [markdown]
# Below layer 14 nothing moves, since nothing acts there. From it on, steering is a shift that later blocks carry
# along. Ablation at one layer brings the projection to 0 there, but the blocks above write part of it back: to keep it
# out, ablate every layer. A cap moves only what is above it.

# %%
after = {name: values.mean(dim=0) for name, values in projections.items()}
assert (after[f"steer layer {LAYER} by 2"][:LAYER] - after["nothing"][:LAYER]).abs().max() < 1e-3
assert after["ablate every layer"].abs().max() < 1e-3
pd.DataFrame({name: values.numpy() for name, values in after.items()}).loc[[13, 14, 15, 20, 25, 29]].round(2)

# %% [markdown]
# ## What they do to the trait, and what that costs
#
# Two numbers for each intervention at each of six layers, read from the probabilities of texts that are written
# already, so that no sampling noise comes in:
#
# - *trait*: how much likelier the positive answers become than the negative ones, in nats for each token;
# - *cost*: how much less likely the model's own neutral answers become.


# %%
def likelihood(texts, interventions=()):
    found = pl.measure_capability(model, (), texts=texts, interventions=interventions, progress=False)
    return pd.Series([text.log_likelihood for text in found.texts]).mean()


def three_numbers(interventions=()):
    shown, hidden = (
        likelihood([(row.question, row.response) for row in sides[side][:10]], interventions)
        for side in ("positive", "negative")
    )
    return shown - hidden, likelihood([(row.question, row.response) for row in neutral], interventions)


trait_before, neutral_before = three_numbers()
rows = []
for layer in (4, 9, 14, 19, 24, 28):
    vector = vectors.at(layer)
    held = pl.Cap(vector, maximum=float(plain[:, layer].mean()) - 1.0)
    for kind, each in {
        "steer by 2": pl.Steer(vector, 2.0),
        "steer by -2": pl.Steer(vector, -2.0),
        "ablate": pl.Ablate(vector),
        "cap": held,
    }.items():
        trait_now, neutral_now = three_numbers([each])
        rows.append((kind, layer, trait_now - trait_before, neutral_before - neutral_now))
table = pd.DataFrame(rows, columns=["kind", "layer", "trait", "cost"])
table.pivot(index="layer", columns="kind", values=["trait", "cost"]).round(2)

# %%
colours = {"steer by 2": "#D55E00", "steer by -2": "#0072B2", "ablate": "#009E73", "cap": "#CC79A7"}
figure = go.Figure()
for kind, found in table.groupby("kind", sort=False):
    figure.add_scatter(
        x=found["cost"],
        y=found["trait"],
        text=found["layer"],
        name=kind,
        mode="lines+markers+text",
        textposition="top center",
        marker={"size": 10, "color": colours[kind]},
        line={"width": 1, "color": colours[kind]},
    )
figure.update_layout(
    template="simple_white",
    width=900,
    height=520,
    title="what each intervention does to the trait, and what it costs (numbers are layers)",
    xaxis_title="cost: nats a token lost on the model's own answers",
    yaxis_title="trait: nats a token, positive over negative texts",
)
figure.add_hline(y=0, line={"color": "#9A9A9A", "width": 1, "dash": "dash"}, layer="below")
figure

# %% [markdown]
# ## What the model says
#
# The same question, greedily, under each.

# %%
ask = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": trait.evaluation_questions[8]},
]
prompt = tokenize_chat(model.tokenizer, ask).prompt


def answer():
    return model.tokenizer.decode(pl.generate(model, [prompt], max_new_tokens=24, temperature=0)[0].tokens)


answers = {"nothing": answer()}
for name, interventions in done.items():
    with pl.intervene(model, *interventions, at="response"):
        answers[name] = answer()
print(ask[1]["content"])
pd.Series(answers, name="answer").to_frame()

# %% [markdown]
# A model of 135 million parameters shows that the tools do what they say; on this trait, ablation does not lower the
# score of what it says (measured with more questions in docs/experiments.md). Steering does.
