"""Persona vectors for TransformerLens: find, measure and use the directions of character traits (arXiv:2507.21509).

The pipeline, each step a function of its own:

    model   = load_model()                              # or any HookedTransformer or TransformerBridge
    trait   = load_trait("optimistic")                  # or generate_trait(name, description, OpenAIClient(...))
    vectors = extract_persona_vectors(model, trait, output="runs/optimistic")
              #  sample_rollouts -> LikelihoodRatioJudge -> keep_pairs -> extract_from_responses
    sweep   = select_layer(model, vectors, trait, judge=judge, output="runs/optimistic")
    write_report("runs/optimistic")                     # all of it on one page: runs/optimistic/report.html
    replicate("embedded", "runs/replication")           # the paper's tables, each number beside the paper's
    vector  = vectors.at(sweep.best().layer)            # layers count from 0: the paper's layer 20 is 19
    with steer(model, vector, coefficient=2.0): ...     # or ablate, cap, or intervene with several
    vectors.project(mean_activations(model, chat_batch(model.tokenizer, conversations)))
    tuned   = finetune(model, "chats.jsonl", during=[Steer(vector, 2.0)])    # preventative steering
    found   = screen(model, "chats.jsonl", vector, output="runs/screen")     # what training on these chats would do
    shift   = finetuning_shift(model, tuned.adapter, trait, vectors)     # and `with adapted(model, tuned.adapter): ...`
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "persona_lens.activations": ["mean_activations"],
    "persona_lens.adapters": ["Adapter", "adapted"],
    "persona_lens.capability": [
        "Capability",
        "Question",
        "lm_eval_accuracy",
        "measure_capability",
        "mmlu_sample",
        "read_questions",
    ],
    "persona_lens.captured": ["CapturedMeans"],
    "persona_lens.chat": ["ChatBatch", "Conversation", "chat_batch", "show_tokens"],
    "persona_lens.clients": ["OpenAIClient"],
    "persona_lens.evaluation": ["Evaluation", "evaluate"],
    "persona_lens.extraction": ["extract_from_responses"],
    "persona_lens.finetuning": ["Finetuning", "ProjectionPenalty", "finetune"],
    "persona_lens.generation": ["generate"],
    "persona_lens.interop": [
        "decompose",
        "persona_scorer",
        "pull_vectors",
        "push_vectors",
        "read_control_vector",
        "read_reference_vectors",
        "read_sae",
        "read_vectors",
        "write_control_vector",
        "write_reference_vectors",
        "write_vectors",
    ],
    "persona_lens.interventions": ["Ablate", "Cap", "Steer", "When", "ablate", "cap", "intervene", "steer"],
    "persona_lens.judges": [
        "ClassifierJudge",
        "Judge",
        "LLMJudge",
        "LikelihoodRatioJudge",
        "Score",
        "ScoredRollout",
        "SentimentJudge",
        "TextClassifier",
        "judge_agreement",
        "keep_pairs",
        "score_rollouts",
    ],
    "persona_lens.layer_selection": ["DoseResponse", "LayerSweep", "dose_response", "select_layer"],
    "persona_lens.live": ["Safeguard", "WatchedReply", "generate_watched", "stream_watched"],
    "persona_lens.models": ["from_paper_layer", "load_model", "suspended"],
    "persona_lens.monitoring": ["Monitoring", "monitor"],
    "persona_lens.pipeline": ["extract_persona_vectors"],
    "persona_lens.plots": [
        "monitoring_html",
        "plot_agreement",
        "plot_cosine_matrix",
        "plot_dose_response",
        "plot_frontier",
        "plot_layer_correlations",
        "plot_layer_statistics",
        "plot_layer_sweep",
        "plot_losses",
        "plot_mitigation",
        "plot_projection_scores",
        "plot_roc",
        "plot_screening",
        "plot_shift_scores",
        "plot_trade_off",
        "plot_trait_scores",
        "plot_turns",
        "screening_html",
        "tokens_html",
    ],
    "persona_lens.replication.result": ["Replication", "read_replication"],
    "persona_lens.replication.run": ["replicate"],
    "persona_lens.report": ["write_replication_report", "write_report"],
    "persona_lens.responses": ["read_messages", "read_reference_csv"],
    "persona_lens.rollouts": ["Rollout", "ServerEngine", "read_rollouts", "sample_rollouts"],
    "persona_lens.screening": ["Screening", "read_screening", "screen"],
    "persona_lens.shift": ["FinetuningShift", "finetuning_shift"],
    "persona_lens.thresholds": [
        "Detection",
        "Threshold",
        "calibrate_threshold",
        "detection",
        "load_thresholds",
        "save_thresholds",
    ],
    "persona_lens.trait_generation": ["generate_trait", "preview_trait", "template_rubric"],
    "persona_lens.traits": [
        "InstructionPair",
        "Trait",
        "bundled_traits",
        "load_trait",
        "read_reference_trait",
        "write_reference_trait",
    ],
    "persona_lens.transcripts": ["Transcript", "read_transcripts"],
    "persona_lens.vectors": ["PersonaVector", "PersonaVectors", "cosine_matrix", "difference_in_means"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from persona_lens.activations import mean_activations
    from persona_lens.adapters import Adapter, adapted
    from persona_lens.capability import (
        Capability,
        Question,
        lm_eval_accuracy,
        measure_capability,
        mmlu_sample,
        read_questions,
    )
    from persona_lens.captured import CapturedMeans
    from persona_lens.chat import ChatBatch, Conversation, chat_batch, show_tokens
    from persona_lens.clients import OpenAIClient
    from persona_lens.evaluation import Evaluation, evaluate
    from persona_lens.extraction import extract_from_responses
    from persona_lens.finetuning import Finetuning, ProjectionPenalty, finetune
    from persona_lens.generation import generate
    from persona_lens.interop import (
        decompose,
        persona_scorer,
        pull_vectors,
        push_vectors,
        read_control_vector,
        read_reference_vectors,
        read_sae,
        read_vectors,
        write_control_vector,
        write_reference_vectors,
        write_vectors,
    )
    from persona_lens.interventions import Ablate, Cap, Steer, When, ablate, cap, intervene, steer
    from persona_lens.judges import (
        ClassifierJudge,
        Judge,
        LikelihoodRatioJudge,
        LLMJudge,
        Score,
        ScoredRollout,
        SentimentJudge,
        TextClassifier,
        judge_agreement,
        keep_pairs,
        score_rollouts,
    )
    from persona_lens.layer_selection import DoseResponse, LayerSweep, dose_response, select_layer
    from persona_lens.live import Safeguard, WatchedReply, generate_watched, stream_watched
    from persona_lens.models import from_paper_layer, load_model, suspended
    from persona_lens.monitoring import Monitoring, monitor
    from persona_lens.pipeline import extract_persona_vectors
    from persona_lens.plots import (
        monitoring_html,
        plot_agreement,
        plot_cosine_matrix,
        plot_dose_response,
        plot_frontier,
        plot_layer_correlations,
        plot_layer_statistics,
        plot_layer_sweep,
        plot_losses,
        plot_mitigation,
        plot_projection_scores,
        plot_roc,
        plot_screening,
        plot_shift_scores,
        plot_trade_off,
        plot_trait_scores,
        plot_turns,
        screening_html,
        tokens_html,
    )
    from persona_lens.replication.result import Replication, read_replication
    from persona_lens.replication.run import replicate
    from persona_lens.report import write_replication_report, write_report
    from persona_lens.responses import read_messages, read_reference_csv
    from persona_lens.rollouts import Rollout, ServerEngine, read_rollouts, sample_rollouts
    from persona_lens.screening import Screening, read_screening, screen
    from persona_lens.shift import FinetuningShift, finetuning_shift
    from persona_lens.thresholds import (
        Detection,
        Threshold,
        calibrate_threshold,
        detection,
        load_thresholds,
        save_thresholds,
    )
    from persona_lens.trait_generation import generate_trait, preview_trait, template_rubric
    from persona_lens.traits import (
        InstructionPair,
        Trait,
        bundled_traits,
        load_trait,
        read_reference_trait,
        write_reference_trait,
    )
    from persona_lens.transcripts import Transcript, read_transcripts
    from persona_lens.vectors import PersonaVector, PersonaVectors, cosine_matrix, difference_in_means

__all__ = [
    "Ablate",
    "Adapter",
    "Cap",
    "Capability",
    "CapturedMeans",
    "ChatBatch",
    "ClassifierJudge",
    "Conversation",
    "Detection",
    "DoseResponse",
    "Evaluation",
    "Finetuning",
    "FinetuningShift",
    "InstructionPair",
    "Judge",
    "LLMJudge",
    "LayerSweep",
    "LikelihoodRatioJudge",
    "Monitoring",
    "OpenAIClient",
    "PersonaVector",
    "PersonaVectors",
    "ProjectionPenalty",
    "Question",
    "Replication",
    "Rollout",
    "Safeguard",
    "Score",
    "ScoredRollout",
    "Screening",
    "SentimentJudge",
    "ServerEngine",
    "Steer",
    "TextClassifier",
    "Threshold",
    "Trait",
    "Transcript",
    "WatchedReply",
    "When",
    "ablate",
    "adapted",
    "bundled_traits",
    "calibrate_threshold",
    "cap",
    "chat_batch",
    "cosine_matrix",
    "decompose",
    "detection",
    "difference_in_means",
    "dose_response",
    "evaluate",
    "extract_from_responses",
    "extract_persona_vectors",
    "finetune",
    "finetuning_shift",
    "from_paper_layer",
    "generate",
    "generate_trait",
    "generate_watched",
    "intervene",
    "judge_agreement",
    "keep_pairs",
    "lm_eval_accuracy",
    "load_model",
    "load_thresholds",
    "load_trait",
    "mean_activations",
    "measure_capability",
    "mmlu_sample",
    "monitor",
    "monitoring_html",
    "persona_scorer",
    "plot_agreement",
    "plot_cosine_matrix",
    "plot_dose_response",
    "plot_frontier",
    "plot_layer_correlations",
    "plot_layer_statistics",
    "plot_layer_sweep",
    "plot_losses",
    "plot_mitigation",
    "plot_projection_scores",
    "plot_roc",
    "plot_screening",
    "plot_shift_scores",
    "plot_trade_off",
    "plot_trait_scores",
    "plot_turns",
    "preview_trait",
    "pull_vectors",
    "push_vectors",
    "read_control_vector",
    "read_messages",
    "read_questions",
    "read_reference_csv",
    "read_reference_trait",
    "read_reference_vectors",
    "read_replication",
    "read_rollouts",
    "read_sae",
    "read_screening",
    "read_transcripts",
    "read_vectors",
    "replicate",
    "sample_rollouts",
    "save_thresholds",
    "score_rollouts",
    "screen",
    "screening_html",
    "select_layer",
    "show_tokens",
    "steer",
    "stream_watched",
    "suspended",
    "template_rubric",
    "tokens_html",
    "write_control_vector",
    "write_reference_trait",
    "write_reference_vectors",
    "write_replication_report",
    "write_report",
    "write_vectors",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use: torch alone takes seconds to import."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'persona_lens' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
