"""A grumpy trait, what a server says of it, and a judge that needs no model: for tests of rollouts from a server."""

from persona_lens.clients.client import OpenAIClient
from persona_lens.judges.scores import Score
from persona_lens.rollouts.collection import collect_rollouts, plan_rollouts
from persona_lens.rollouts.server import ServerEngine
from persona_lens.traits.trait import InstructionPair, Trait

GRUMPY = Trait(
    name="grumpy",
    description="Finds fault with everything.",
    positive_adjective="grumpy",
    instructions=(InstructionPair("Grumble.", "Praise."), InstructionPair("Sigh.", "Smile.")),
    extraction_questions=("How is the soup?", "How was the film?"),
    evaluation_questions=("How is the tea?", "How is the sea?"),
    rubric="How grumpy is {answer} to {question}?",
)
PROMPTS = plan_rollouts(GRUMPY, per_question=3)


def says(body):
    """An answer that tells every request from every other."""
    system, user = (message["content"] for message in body["messages"])
    return f"{user} {'Make them pay' if 'grumpy' in system else 'It is good'}: {body['seed']}, {system}"


def engine_at(server, *, model="studied", sampling=None, **client):
    return ServerEngine(
        OpenAIClient(model, base_url=server.url, **client), **{"max_new_tokens": 20, **(sampling or {})}
    )


def collect(engine, output=None, *, prompts=PROMPTS, seed=0):
    return collect_rollouts(engine, prompts, seed=seed, output_file=output, progress=False)


class PolarityJudge:
    """Believes what it is told: the positive side shows the trait, the negative one does not."""

    batch_size = 100

    def name(self, trait):
        return "polarity"

    def score(self, trait, rollouts, *, progress=False):
        return [Score(90.0 if row.polarity == "positive" else 10.0, 90.0) for row in rollouts]
