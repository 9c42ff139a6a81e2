"""Persona vectors for TransformerLens: find, measure and use the directions of character traits (arXiv:2507.21509).

The pipeline, each step a function of its own:

    model   = load_model()                              # or any HookedTransformer or TransformerBridge
    trait   = load_trait("optimistic")                  # or generate_trait(name, description, OpenAIClient(...))
    judge   = LikelihoodRatioJudge(model)               # or LLMJudge(OpenAIClient("gpt-4.1-mini"))
    vectors = extract_persona_vectors(model, trait, judge=judge, output_dir="runs/optimistic")
              #  sample_rollouts -> score_rollouts -> keep_pairs -> extract_from_responses
    sweep   = select_layer(model, vectors, trait, judge=judge, output_dir="runs/optimistic")
    write_report("runs/optimistic")                     # all of it on one page: runs/optimistic/report.html
    vector  = vectors.at(sweep.best().layer)            # layers count from 0: the paper's layer 20 is 19
    with steer(model, vector, coefficient=2.0): ...     # or ablate, cap, or intervene with several
    monitor(model, "chats.jsonl", vector)               # every turn's projection, before the model speaks
    screen(model, "chats.jsonl", vector, output_dir="runs/screen")          # what training on these chats would do
    tuned   = finetune(model, "chats.jsonl", output="runs/tuned", during=[Steer(vector, 2.0)])   # preventative steering
    finetuning_shift(model, tuned.adapter, trait, vectors)                  # and `with adapted(model, tuned.adapter):`
    replicate("embedded", "runs/replication")           # the paper's tables, each number beside the paper's
"""

import lazy_loader

__version__ = "0.1.0"

# Torch alone takes seconds to import: a name is imported from its home, as __init__.pyi has it, when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
