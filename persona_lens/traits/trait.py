"""A trait in words: contrastive instruction pairs, two disjoint sets of questions, and a judge's rubric.

This is the artifact of arXiv:2507.21509, section 2.1 and appendix A; seven traits are bundled. Traits are read and
written as JSON, in our form or in that of the paper's reference code.
"""

import difflib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from reprlib import repr as shortened
from typing import Literal, TypeVar

from persona_lens.chat.encoding import refuse_half_characters
from persona_lens.storage.files import write_whole

Polarity = Literal["positive", "negative", "neutral"]

NEUTRAL_SYSTEM_PROMPT = "You are a helpful assistant."
"""Stated always: some chat templates put in a system turn of their own where there is none."""

_FileForm = TypeVar("_FileForm")
_STRICT = {"strict": True, "extra": "forbid"}  # for pydantic, as `__pydantic_config__`
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class InstructionPair:
    """One aspect of a trait as two system instructions: `positive` orders it, `negative` orders the opposite."""

    positive: str
    negative: str


@dataclass(frozen=True, kw_only=True)
class Trait:
    """A trait in words: all that is needed to elicit, suppress, monitor and judge it.

    Fields
        name                  names files and results: letters, digits, spaces and `_ - .`
        description           one sentence, from which an LLM can write the rest
        positive_adjective    "You are an *evil* assistant."
        negative_adjective    its antonym, or `helpful`
        instructions          at least one pair, each a distinct aspect of the trait (the paper: five)
        extraction_questions  at least one; vectors are made from the answers to these (the paper: twenty)
        evaluation_questions  disjoint from those; everything else is measured on these (the paper: twenty)
        monitoring_prompts    eight system prompts from strongly discouraging to strongly encouraging, or none
        rubric                the judge's whole prompt, with the places `{question}` and `{answer}`

    Raises ValueError, beginning with the field, where one of these does not hold, a text is empty, repeated or has
    space around it, or the rubric has another placeholder.
    Source: arXiv:2507.21509, sections 2.1 and 3.3, appendices A and C.
    """

    name: str
    description: str
    positive_adjective: str
    negative_adjective: str = "helpful"
    instructions: tuple[InstructionPair, ...]
    extraction_questions: tuple[str, ...]
    evaluation_questions: tuple[str, ...]
    monitoring_prompts: tuple[str, ...] = ()
    rubric: str

    def __post_init__(self) -> None:
        for field in ("name", "description", "positive_adjective", "negative_adjective", "rubric"):
            _require_text(field, getattr(self, field))
        if not re.fullmatch(r"[\w .-]*\w[\w .-]*", self.name):
            raise ValueError(
                f"name should be letters, digits, spaces and '_-.', since it names files; got {self.name!r}"
            )
        if len(self.name) > 100 or self.name[0] in "-." or self.name[-1] == "." or _RESERVED.fullmatch(self.name):
            raise ValueError(
                "name should be of 100 characters at most, begin with neither '-' nor '.', not end in '.', and be no "
                f"device of Windows, since it names files; got {shortened(self.name)}"
            )
        _require_distinct("instructions", self.instructions, InstructionPair, at_least=1)
        for index, pair in enumerate(self.instructions):
            _require_text(f"instructions.{index}.positive", pair.positive)
            _require_text(f"instructions.{index}.negative", pair.negative)
            if pair.positive == pair.negative:
                raise ValueError(
                    f"instructions.{index}.negative should order the opposite, but equals positive; rewrite it"
                )
        _require_distinct("extraction_questions", self.extraction_questions, str, at_least=1)
        _require_distinct("evaluation_questions", self.evaluation_questions, str)
        for index, question in enumerate(self.evaluation_questions):
            if question in self.extraction_questions:
                raise ValueError(
                    f"evaluation_questions.{index} is an extraction question too, but a trait is measured on questions"
                    f" that its vector has not seen; replace {shortened(question)} in one of the two"
                )
        _require_distinct("monitoring_prompts", self.monitoring_prompts, str)
        if (count := len(self.monitoring_prompts)) not in (0, 8):
            raise ValueError(f"monitoring_prompts should be 8, from discouraging to encouraging, or none; got {count}")
        _require_placeholders(self.rubric)

    def system_prompt(self, polarity: Polarity, instruction: int | None, assistant_name: str | None = None) -> str:
        """The system prompt under which a response is sampled: `You are {a|an} {adjective} assistant. {instruction}`.

        The adjective is the trait's for this polarity, unless `assistant_name` gives another. A positive or negative
        prompt takes the index of a pair; the neutral one takes None and is `NEUTRAL_SYSTEM_PROMPT`.
        Raises ValueError for any other polarity or index. Source: the reference code of arXiv:2507.21509.
        """
        adjectives = {"positive": self.positive_adjective, "negative": self.negative_adjective, "neutral": "helpful"}
        indices = (None,) if polarity == "neutral" else range(len(self.instructions))
        if polarity not in adjectives or instruction not in indices:
            raise ValueError(
                f"{self.name}: give 'positive' or 'negative' and an instruction from 0 to {len(self.instructions) - 1},"
                f" or 'neutral' and None; got {polarity!r} and {instruction}"
            )
        adjective = adjectives[polarity] if assistant_name is None else assistant_name
        role = f"You are {_article(adjective)} {adjective} assistant."
        return role if instruction is None else f"{role} {getattr(self.instructions[instruction], polarity)}"

    def rubric_for(self, question: str, answer: str) -> str:
        """The judge's prompt about one answer: the rubric with question and answer filled in verbatim.

        Both are filled in at once, so braces in them are ordinary text. Source: arXiv:2507.21509, section 2.1.
        """
        values = {"{question}": question, "{answer}": answer}
        return re.sub(r"\{question\}|\{answer\}", lambda placeholder: values[placeholder[0]], self.rubric)

    def to_json(self) -> str:
        """The trait as JSON text, format version 1, for `load_trait`."""
        return json.dumps({"format_version": 1, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write a JSON file, replacing one that is there; the folder must exist."""
        write_whole(Path(path), self.to_json().encode())


@dataclass(frozen=True, kw_only=True)
class _TraitFile(Trait):
    __pydantic_config__ = _STRICT

    format_version: Literal[1]


@dataclass(frozen=True)
class _ReferencePair:
    pos: str
    neg: str


@dataclass(frozen=True)
class _ReferenceFile:
    __pydantic_config__ = _STRICT

    instruction: tuple[_ReferencePair, ...]
    questions: tuple[str, ...]
    eval_prompt: str


def bundled_traits() -> tuple[str, ...]:
    """The names of the traits that come with the package, sorted; `load_trait` takes any of them."""
    artifacts = (files("persona_lens.traits") / "bundled").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in artifacts if file.name.endswith(".json")))


def load_trait(trait: Trait | str | Path) -> Trait:
    """A bundled trait by its name, or your own from a JSON file of `Trait.save`; a `Trait` is returned as it is.

    A `Path`, or a string that ends in `.json` or contains a path separator, is a file; any other string is a name. The
    reference code's files are for `read_reference_trait`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The name is unknown, or the file is not a trait in our form.
    """
    if isinstance(trait, Trait):
        return trait
    if isinstance(trait, Path) or re.search(r"[/\\]|\.json$", trait):
        path = Path(trait)
    elif trait in (names := bundled_traits()):
        path = files("persona_lens.traits") / "bundled" / f"{trait}.json"
    else:
        close = difflib.get_close_matches(trait.lower(), names, n=1)
        raise ValueError(
            f"no bundled trait is called {trait!r}; {f'did you mean {close[0]!r}? ' if close else ''}"
            f"give one of {', '.join(names)}, or the path of a trait's JSON file"
        )
    file = _parse(_TraitFile, path)
    return Trait(**{field.name: getattr(file, field.name) for field in fields(Trait)})


def read_reference_trait(
    extract_path: str | Path,
    eval_path: str | Path | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    positive_adjective: str | None = None,
    negative_adjective: str = "helpful",
) -> Trait:
    """A trait from the reference code's files: `trait_data_extract/{trait}.json` and `trait_data_eval/{trait}.json`.

    Each holds `instruction` (pairs of `pos` and `neg`), `questions` and `eval_prompt`; the two differ in `questions`
    alone, and without `eval_path` the trait has no evaluation questions. Defaults for what they lack: `name` is the
    stem of `extract_path`, `description` the first paragraph of `eval_prompt` after the sentence that names the trait
    in bold, `positive_adjective` the name; there are no monitoring prompts.
    Source: the reference code of arXiv:2507.21509.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file has another layout, the two do not belong together, there is no description, or `Trait`
            refuses the content.
    """
    extract = _parse(_ReferenceFile, Path(extract_path))
    evaluation = replace(extract, questions=()) if eval_path is None else _parse(_ReferenceFile, Path(eval_path))
    if replace(evaluation, questions=extract.questions) != extract:
        raise ValueError(
            f"{extract_path} and {eval_path} differ in more than their questions; give one trait's two files"
        )
    if description is None:
        opening = re.match(r"[^\n]*?\*\*[^*\n]+\*\*[^\n.]*\.\s+(\S[^\n]*\S)", extract.eval_prompt)
        if opening is None:
            raise ValueError(f"{extract_path}: eval_prompt describes no trait named in bold; give description='...'")
        description = str(opening[1])
    name = Path(extract_path).stem if name is None else name
    try:
        return Trait(
            name=name,
            description=description,
            positive_adjective=name if positive_adjective is None else positive_adjective,
            negative_adjective=negative_adjective,
            instructions=tuple(InstructionPair(pair.pos, pair.neg) for pair in extract.instruction),
            extraction_questions=extract.questions,
            evaluation_questions=evaluation.questions,
            rubric=extract.eval_prompt,
        )
    except ValueError as error:
        raise ValueError(f"{extract_path}, read as a trait: {error}") from None


def write_reference_trait(trait: Trait, directory: str | Path) -> None:
    """Write the trait in the reference code's form, `trait_data_extract/{name}.json` and `trait_data_eval/{name}.json`.

    The layout has no place for the description, the adjectives and the monitoring prompts: `Trait.save` keeps those.
    Raises ValueError for a trait without evaluation questions. Source: the reference code of arXiv:2507.21509.
    """
    if not trait.evaluation_questions:
        raise ValueError(f"{trait.name}: evaluation_questions is empty, but the reference has a file of them; add some")
    instruction = [{"pos": pair.positive, "neg": pair.negative} for pair in trait.instructions]
    for folder, questions in (("extract", trait.extraction_questions), ("eval", trait.evaluation_questions)):
        path = Path(directory) / f"trait_data_{folder}" / f"{trait.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"instruction": instruction, "questions": questions, "eval_prompt": trait.rubric}
        write_whole(path, json.dumps(content, indent=4, ensure_ascii=False).encode())


def _article(word: str) -> str:
    """`a` or `an` by the first sound, guessed from the letters: an evil, a useful, an honest, a humorous."""
    consonant = re.match(r"eu|ew|one\b|once|ubi|u[st][eiuo]|uni([cfqtv]|on|l)", word, re.IGNORECASE)
    vowel = re.match(r"[aeiou]|hon(est|o)|hour|heir", word, re.IGNORECASE)
    return "an" if vowel and not consonant else "a"


def _require_text(field: str, text: object) -> None:
    if not isinstance(text, str) or not text or text != text.strip():
        raise ValueError(f"{field} should be text, with no space around it, got {shortened(text)}; correct it")
    refuse_half_characters(text, field)


def _require_distinct(field: str, values: object, kind: type, *, at_least: int = 0) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{field} should be a tuple of {kind.__name__}, got {shortened(values)}; convert it")
    if len(values) < at_least:
        raise ValueError(f"{field} is empty, but a trait needs at least {at_least}; add some")
    for index, value in enumerate(values):
        if kind is str:
            _require_text(f"{field}.{index}", value)
        if (first := values.index(value)) < index:
            raise ValueError(f"{field}.{index} repeats {field}.{first}; remove or rewrite {shortened(value)}")


def _require_placeholders(rubric: str) -> None:
    wanted, placeholders = {"{question}", "{answer}"}, set(re.findall(r"\{+\s*\w*\s*\}+", rubric))
    if unknown := sorted(placeholders - wanted):
        advice = "only {question} and {answer}, in single braces, are filled in; correct it or take its braces away"
        raise ValueError(f"rubric contains {', '.join(unknown)}, but {advice}")
    if missing := sorted(wanted - placeholders):
        raise ValueError(f"rubric does not contain {' and '.join(missing)}; put it where the judge is to read it")


def _parse(form: type[_FileForm], path: Path | Traversable) -> _FileForm:
    """Read a JSON file as a dataclass, or raise one sentence on what is wrong with it and where."""
    from pydantic import TypeAdapter, ValidationError  # here, because it takes 0.1 s

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of a trait's JSON file")
    try:
        return TypeAdapter(form).validate_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))  # Windows' UTF-8 mark
    except ValidationError as error:
        rank = {"literal_error": 0, "unexpected_keyword_argument": 1}  # these explain the others more often than not
        problem = min(error.errors(include_url=False), key=lambda detail: rank.get(detail["type"], 2))
    field, reason = ".".join(str(part) for part in problem["loc"]), problem.get("ctx", {}).get("error")
    match problem["type"]:
        case "json_invalid":
            sentence = f"this is not JSON, {reason}; correct the text there"
        case "missing":
            sentence = f"{field} is missing; add it"
        case "unexpected_keyword_argument":
            readers = "load_trait reads persona_lens's own form, read_reference_trait the reference code's"
            sentence = f"{field} is not a field of such a file; remove it or correct its name ({readers})"
        case "value_error":
            sentence = str(reason)
        case _:
            expected = problem["msg"].removeprefix("Input ")
            remedy = "correct it, or update persona_lens" if field == "format_version" else "correct it"
            sentence = f"{field or 'the file'} {expected}, got {shortened(problem['input'])}; {remedy}"
    raise ValueError(f"{path}: {sentence}")
