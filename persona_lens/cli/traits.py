"""The commands about traits in words: those that come with the package, and new ones that an LLM writes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.options import AliasOption, DryRunOption, JsonOption, ServerOptions, WriterFieldsOption, command
from persona_lens.cli.output import print_table, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.traits.trait import Trait


@command
def traits(
    name: Annotated[str | None, typer.Argument(help="A trait to show whole; all in a line each by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the bundled traits, or show one whole.

    Example: persona-lens traits evil
    """
    from persona_lens.traits.trait import bundled_traits, load_trait

    if name is not None:
        tell(load_trait(name).to_json())
        return
    loaded = [load_trait(name) for name in bundled_traits()]
    if as_json:
        tell_json([{"name": trait.name, "description": trait.description} for trait in loaded])
    else:
        print_table(["trait", "description"], [[trait.name, trait.description] for trait in loaded])


@command
def generate_trait(
    name: Annotated[str, typer.Argument(help="The trait in a word or two.")],
    description: Annotated[str, typer.Option(help="One sentence on what the trait is.")],
    writer: Annotated[str, typer.Option(help="The LLM that writes: openai:MODEL, or openai:MODEL@URL.")],
    output: Annotated[Path, typer.Option(help="The .json file to write; answers are kept in calls.sqlite beside it.")],
    n_pairs: Annotated[int, typer.Option(min=1, help="Pairs of contrastive instructions.")] = 5,
    n_questions: Annotated[int, typer.Option(min=1, help="Questions, half of them for extraction.")] = 40,
    monitoring_prompts: Annotated[
        bool, typer.Option(help="Eight system prompts from discouraging to encouraging.")
    ] = True,
    use_template: Annotated[
        bool, typer.Option("--template-rubric", help="Make the rubric from the description, and ask for none.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length limit of each of at most two calls.")] = 8000,
    seed: Annotated[int, typer.Option(help="Sent to the LLM; also divides the questions.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one answer may take.")] = 600.0,
    alias: AliasOption = None,
    writer_extra_body: WriterFieldsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is another trait.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """An LLM writes a trait from a name and a description; the preview is to be read before it is used.

    Example: persona-lens generate-trait pedantic --description "Puts exactness in small things above what the user
    wants." --writer openai:gpt-4.1 --output pedantic.json
    """
    from persona_lens.storage.files import ensure_writable, write_whole
    from persona_lens.traits import generation as trait_generation
    from persona_lens.traits.generation import template_rubric

    if output.suffix != ".json":
        raise typer.BadParameter(f"--output must end in .json, got {output}")
    ensure_writable(output)
    rubric = template_rubric(name, description) if use_template else None
    arguments = {"n_pairs": n_pairs, "n_questions": n_questions, "monitoring_prompts": monitoring_prompts}
    arguments |= {"rubric": rubric, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    request = trait_generation.trait_request(name, description, **arguments)
    servers = ServerOptions(timeout=timeout, alias=alias)
    client = servers.client(writer, output.parent, extra_body=writer_extra_body, dry_run=dry_run)
    if dry_run:
        estimate = client.estimate([request])
        repair = "a draft with problems is sent back once, which at most doubles this, plus the draft itself"
        tell_json(estimate._asdict()) if as_json else tell(f"{estimate}; {repair}.")
        return
    # What costs a call is refused before it is made; what the cache has is compared for nothing.
    if not overwrite and output.exists() and client.uncached([request]):
        raise _other_trait(output)
    try:
        trait = trait_generation.generate_trait(name, description, client, **arguments)
    except trait_generation.TraitGenerationError as error:
        draft = output.with_suffix(".draft.json")
        write_whole(draft, error.draft.encode())
        raise ValueError(f"{error} The last draft is in {draft}.") from error
    contents = trait.to_json().encode()
    if not overwrite and output.exists() and output.read_bytes() != contents:
        raise _other_trait(output)
    write_whole(output, contents)
    _show(trait, as_json=as_json)
    say(f"{trait.name} is in {output}; the calls: {client.usage}.")


def _other_trait(output: Path) -> FileExistsError:
    return FileExistsError(
        f"{output} exists, and is not the trait that these arguments gave before: name another --output, or "
        "pass --overwrite to replace it."
    )


def _show(trait: "Trait", *, as_json: bool) -> None:
    from persona_lens.traits.generation import preview_trait

    tell((trait.to_json() if as_json else preview_trait(trait)).removesuffix("\n"))
