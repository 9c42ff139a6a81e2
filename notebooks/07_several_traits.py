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
# # Several traits at once
#
# At the end you will know how near the directions of different traits are, what happens when two are steered together,
# how much steering one trait moves the others (interference), and what making one orthogonal to another changes.

# %%
import pandas as pd
from plotly.subplots import make_subplots

import persona_lens as pl

pd.set_option("display.max_colwidth", 200)
model = pl.load_model("smollm2-135m-instruct")
NAMES = ("optimistic", "impolite", "evil", "apathetic")
LAYER = 19

# %% [markdown]
# ## Four directions
#
# Answers to two questions for each trait, under five pairs of contrasting system prompts; to be quick, without the
# judge's choice of pairs that notebook 01 shows.

# %%
rollouts, vectors = {}, {}
for name in NAMES:
    trait = pl.load_trait(name)
    rows = pl.sample_rollouts(
        model,
        trait,
        questions=trait.extraction_questions[:2],
        per_question=1,
        max_new_tokens=20,
        progress=False,
    )
    rollouts[name] = {side: [row for row in rows if row.polarity == side] for side in ("positive", "negative")}
    sides = [[row.conversation() for row in side] for side in rollouts[name].values()]
    vectors[name] = pl.extract_from_responses(model, *sides, trait=name, progress=False)

# %%
pl.plot_cosine_matrix(pl.cosine_matrix(list(vectors.values()), layer=LAYER), f"cosines at layer {LAYER}")

# %% [markdown]
# The directions are not independent: the ill-natured traits share one, and `optimistic` points away from them. The
# paper finds the same on Qwen2.5-7B (evil and impolite .55, evil and optimistic -.47).

# %% [markdown]
# ## Composition
#
# Vectors add up: steering by a sum is steering by both. And values compose: `pl.intervene` takes several.

# %%
first, second = (vectors[name].at(LAYER) for name in ("optimistic", "impolite"))
ask = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Should I start learning the piano at fifty?"},
]


def answer(*interventions):
    with pl.intervene(model, *interventions, at="response"):
        return pl.generate_text(model, [ask], max_new_tokens=28, temperature=0)[0]


answers = {
    "optimistic": answer(pl.Steer(first, 2.0)),
    "impolite": answer(pl.Steer(second, 2.0)),
    "both": answer(pl.Steer(first, 2.0), pl.Steer(second, 2.0)),
    "their sum": answer(pl.Steer(first + second, 2.0)),
    "optimistic, not impolite": answer(pl.Steer(first, 2.0), pl.Ablate(second)),
}
assert answers["both"] == answers["their sum"]
pd.Series(answers, name="answer").to_frame()

# %% [markdown]
# ## Interference
#
# Steer one trait; how much likelier do the positive texts of *every* trait become than its negative ones? In nats for
# each token, read from texts that are written already. What stands off the diagonal is interference.

# %%
COEFFICIENT = 2.0


texts = [(name, side, row) for name in NAMES for side, rows in rollouts[name].items() for row in rows]


def preferences(interventions=()):
    """Of every trait: the mean log-likelihood of its positive texts minus that of its negative ones."""
    pairs = [(row.question, row.response) for _, _, row in texts]
    found = pl.measure_capability(model, (), texts=pairs, interventions=interventions, progress=False)
    table = pd.DataFrame([(name, side) for name, side, _ in texts], columns=["trait", "side"])
    table["likelihood"] = [text.log_likelihood for text in found.texts]
    means = table.groupby(["trait", "side"])["likelihood"].mean().unstack()
    return (means["positive"] - means["negative"]).loc[list(NAMES)]


before = preferences()


def effects(directions):
    return pd.DataFrame(
        {name: preferences([pl.Steer(each, COEFFICIENT)]) - before for name, each in directions.items()}
    ).T


raw = {name: vectors[name].at(LAYER) for name in NAMES}
plain = effects(raw)

# %% [markdown]
# ## Orthogonalised steering
#
# Each direction without its component in the span of the other three: what is its own. It is shorter, so it is given
# its old length back, and both kinds push equally hard.

# %%
own = {}
for name in NAMES:
    rest = raw[name].orthogonal_to(*(raw[other] for other in NAMES if other != name))
    print(f"{name}: {rest.norm / raw[name].norm:.0%} of its length is its own")
    own[name] = rest * (raw[name].norm / rest.norm)
apart = effects(own)

# %%
reach = max(plain.abs().to_numpy().max(), apart.abs().to_numpy().max())
figure = make_subplots(
    1, 2, subplot_titles=["as extracted", "orthogonal to the others"], horizontal_spacing=0.04, shared_yaxes=True
)
for column, table in enumerate((plain, apart), start=1):
    figure.add_heatmap(
        z=table.to_numpy().tolist(),
        x=list(NAMES),
        y=list(NAMES),
        text=table.round(2).to_numpy().tolist(),
        texttemplate="%{text}",
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
        row=1,
        col=column,
    )
figure.update_yaxes(autorange="reversed", ticks="", showline=False)
figure.update_xaxes(ticks="", showline=False, title_text="whose texts became likelier (nats a token)")
figure.update_yaxes(title_text="steered", col=1)
figure.update_layout(
    template="simple_white",
    width=1000,
    height=460,
    title=f"what steering one trait does to the others, layer {LAYER}, coefficient {COEFFICIENT:g}",
    coloraxis={"colorscale": "RdBu_r", "cmin": -reach, "cmax": reach, "colorbar": {"title": "change"}},
    margin={"t": 90},
)
figure


# %%
def off_diagonal(table):
    return pd.Series([abs(table.loc[a, b]) for a in NAMES for b in NAMES if a != b]).mean()


def on_diagonal(table):
    return pd.Series([table.loc[name, name] for name in NAMES]).mean()


pd.DataFrame(
    {
        kind: {"own trait": on_diagonal(table), "other traits (size)": off_diagonal(table)}
        for kind, table in {"as extracted": plain, "orthogonal": apart}.items()
    }
).round(2)

# %% [markdown]
# Interference shrinks by more than the effect on the own trait does, and does not vanish: directions that are
# orthogonal at one layer need not stay so in what the blocks above make of them.
#
# The texts are those that the directions were made of, two questions a trait: read the sizes beside each other, not as
# effects on new questions. What is cut away is also what the traits truly share. If evil answers are impolite, a
# direction without impoliteness is a narrower evil.
